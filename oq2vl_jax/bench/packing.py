"""Measures bin assignment: fill and documents per second on the two length distributions of docs/experiments.md."""

import time
from dataclasses import dataclass

import numpy as np

from oq2vl_jax.bounds import Count, Seed
from oq2vl_jax.data.packing.bins import pack_rows
from oq2vl_jax.memory import check_fits, host_bytes

NUM_TOKENS, MAX_IMAGES = 4096, 28
VISUAL_TOKENS = 144
BYTES_PER_DOCUMENT = 100
"""Host memory for a document's lengths and for its entry in the rows."""


@dataclass(frozen=True)
class Packing:
    """Fill and speed of bin assignment, on caption lengths and on captions mixed with 30 % long documents."""

    num_documents: Count = 20_000
    seed: Seed = 1
    repeats: Count = 3
    """Runs of the assignment; the fastest counts."""
    json: bool = False
    """Print one JSON object instead of a table."""


OPTIONS = Packing


def document_lengths(count: int, share_long: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens, images) of one-image captions with a share of long documents; both lengths are log-normal,
    as on the web."""
    rng = np.random.default_rng(seed)
    short = VISUAL_TOKENS + np.clip(rng.lognormal(2.8, 0.6, count), 5, 200).astype(int)
    long = np.clip(rng.lognormal(6.8, 0.7, count), 200, NUM_TOKENS).astype(int)
    return np.where(rng.random(count) < share_long, long, short), np.ones(count, int)


def measure(config: Packing) -> list[dict]:
    needed, remedy = BYTES_PER_DOCUMENT * config.num_documents, "take fewer --num-documents"
    check_fits(f"lengths of {config.num_documents:,} documents", needed, host_bytes(), "this machine", remedy)
    results = []
    for name, share_long in (("captions", 0.0), ("30 % long documents", 0.3)):
        tokens, images = document_lengths(config.num_documents, share_long, config.seed)
        seconds, rows = [], []
        for _ in range(config.repeats):
            start = time.perf_counter()
            rows = pack_rows(tokens, images, NUM_TOKENS, MAX_IMAGES)
            seconds.append(time.perf_counter() - start)
        results.append(
            {
                "lengths": name,
                "documents": config.num_documents,
                "rows": len(rows),
                "fill": float(tokens.sum() / (NUM_TOKENS * len(rows))),
                "most_images_in_a_row": max(int(images[row].sum()) for row in rows),
                "documents_per_second": config.num_documents / min(seconds),
            }
        )
    return results
