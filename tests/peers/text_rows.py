"""Rows of text for the JAX peers: several documents a row, a share of the positions labelled."""

from pathlib import Path

import numpy as np

IGNORE = -100
SHORTEST, LONGEST = 60, 400
"""Tokens of a document."""


def write_text_rows(path: Path, num_rows: int, num_tokens: int, vocabulary: int, labelled: float, seed: int) -> None:
    """Writes tokens, labels (of the next token, IGNORE where there is none), segment_ids (0: padding) and positions,
    each int32 [num_rows, num_tokens]. labelled: share of the positions with a next token that are labelled."""
    rng = np.random.default_rng(seed)
    tokens, segments, positions = np.zeros((3, num_rows, num_tokens), np.int32)
    labels = np.full((num_rows, num_tokens), IGNORE, np.int32)
    for row in range(num_rows):
        start, document = 0, 1
        while start < num_tokens:
            end = min(num_tokens, start + int(rng.integers(SHORTEST, LONGEST + 1)))
            text = rng.integers(0, vocabulary, end - start)
            tokens[row, start:end], segments[row, start:end] = text, document
            positions[row, start:end] = np.arange(end - start)
            is_labelled = rng.random(end - start - 1) < labelled
            labels[row, start : end - 1] = np.where(is_labelled, text[1:], IGNORE)
            start, document = end, document + 1
    np.savez(path, tokens=tokens, labels=labels, segment_ids=segments, positions=positions)
