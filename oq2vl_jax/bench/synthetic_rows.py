"""Makes packed rows without a data set: realistic lengths and numbers of images, random contents."""

import numpy as np

from oq2vl_jax.config import TrainConfig
from oq2vl_jax.data.loading.batch import IGNORE, Batch
from oq2vl_jax.train.flops import text_tokens

SIGMA = 0.6
"""Of the log-normal length of a document's text; its mean is train/flops.py's typical number of tokens."""


def make_rows(config: TrainConfig, num_rows: int, seed: int = 0) -> Batch:
    """Returns a batch of rows, each filled with documents of one image and some text until tokens or image slots end.

    All text is labelled (in conversations only answers would be); token ids are random.
    """
    rng = np.random.default_rng(seed)
    num_tokens, visual = config.data.num_tokens, config.model.num_visual_tokens
    shape = (num_rows, num_tokens)
    tokens, labels = np.zeros(shape, np.int32), np.full(shape, IGNORE, np.int32)
    positions, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    size = config.model.vision.image_size
    images = np.zeros((num_rows, config.data.max_images, size, size, 3), np.uint8)
    highest = min(config.model.image_token_id, config.model.decoder.vocab_size)
    for row in range(num_rows):
        for slot, (start, length) in enumerate(documents(config, rng)):
            document = slice(start, start + length)
            ids = rng.integers(0, highest, length)
            ids[:visual] = config.model.image_token_id
            tokens[row, document], segments[row, document] = ids, slot + 1
            positions[row, document] = np.arange(length)
            labels[row, start + visual - 1 : start + length - 1] = ids[visual:]
            images[row, slot] = rng.integers(0, 256, images.shape[2:], dtype=np.uint8)
    return Batch(tokens, labels, positions, segments, images)


def documents(config: TrainConfig, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Returns (start, length) of the documents in one row; the text of the last one is cut at the end of the row."""
    mean = text_tokens(config)
    visual, placed, start = config.model.num_visual_tokens, [], 0
    while len(placed) < config.data.max_images:
        text = max(2, int(rng.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA)))
        length = min(visual + text, config.data.num_tokens - start)
        if length < visual + 2:
            break
        placed.append((start, length))
        start += length
    return placed
