"""Compares tuning on packed conversations with padded batches: real tokens per second of forward and backward pass.

The lengths are modelled on LLaVA-665k (no copy was available): 40k of 665k entries are text only (ShareGPT), the file
has 1.03 GB, some 250 text tokens per entry, and a picture takes 729 tokens. The same entries are batched in four ways:

    packed         rows of 4,096 tokens in which documents do not see each other (data/packing/bins.py)
    sorted         batches of 128, with or without pictures, sorted by length, padded per device batch: as published
    random         the same without sorting
    full length    every entry padded to the longest, as static shapes need

Each shape is timed once; the seconds of a way are the sum over its batches.
"""

import statistics
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from oq2vl_jax.bounds import Count, Depth, Length, Seed, SmallCount, Width
from oq2vl_jax.config import DataConfig, DecoderConfig, ModelConfig, OptimizerConfig, TrainConfig, VisionConfig

VISUAL_TOKENS = 729
IMAGE_TOKEN = 1
TEXT_ONLY_SHARE = 40 / 665
TEMPLATE_TOKENS = 25
BUCKET = 256
"""Padded lengths are rounded up to a multiple of this, which lengthens padded batches by 128 tokens on average. In the
table, "fill" counts this padding and "fill, exact" does not."""


@dataclass(frozen=True)
class Tuning:
    """Packed against padded tuning, at a width that two cores can run; attention takes a larger share than at 1,536."""

    num_entries: SmallCount = 512
    num_tokens: Length = 4096
    max_images: SmallCount = 5
    global_batch: SmallCount = 128
    device_batch: SmallCount = 4
    """Entries in one forward pass of padded batches."""
    width: Width = 256
    layers: Depth = 4
    repeats: Count = 2
    seed: Seed = 0
    json: bool = False


OPTIONS = Tuning


def measure(config: Tuning) -> list[dict]:
    lengths, images = make_lengths(config)
    ways = {
        "packed": packed(config, lengths, images),
        "sorted": padded(config, lengths, images, is_sorted=True),
        "random": padded(config, lengths, images, is_sorted=False),
        "full length": [(config.device_batch, int(lengths.max()), 1)] * -(-len(lengths) // config.device_batch),
    }
    shapes = {(rows, bucketed(tokens, config), slots) for batches in ways.values() for rows, tokens, slots in batches}
    seconds = {shape: step_seconds(config, *shape) for shape in sorted(shapes)}
    results = []
    for way, batches in ways.items():
        slots = sum(rows * bucketed(tokens, config) for rows, tokens, _ in batches)
        exact = sum(rows * tokens for rows, tokens, _ in batches)
        counts = Counter((rows, bucketed(tokens, config), images_) for rows, tokens, images_ in batches)
        total = sum(count * seconds[shape] for shape, count in counts.items())
        results.append(
            {
                "batches": way,
                "fill": float(lengths.sum() / slots),
                "fill, exact": float(lengths.sum() / exact),
                "real tokens/s": float(lengths.sum() / total),
            }
        )
    for result in results:
        result["packed is faster by"] = results[0]["real tokens/s"] / result["real tokens/s"]
    return results


def make_lengths(config: Tuning) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens, images) of each entry: a picture and a log-normal text of mean 235, or text only of mean 900."""
    rng = np.random.default_rng(config.seed)
    is_text = rng.random(config.num_entries) < TEXT_ONLY_SHARE
    text = np.where(is_text, lognormal(rng, 900, 0.8, len(is_text)), lognormal(rng, 235, 0.7, len(is_text)))
    lengths = TEMPLATE_TOKENS + text + np.where(is_text, 0, VISUAL_TOKENS)
    return np.minimum(lengths, config.num_tokens // 2).astype(int), (~is_text).astype(int)


def lognormal(rng: np.random.Generator, mean: float, sigma: float, count: int) -> np.ndarray:
    return rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)


def packed(config: Tuning, lengths: np.ndarray, images: np.ndarray) -> list[tuple[int, int, int]]:
    """Returns (rows, tokens, image slots per row) of each batch."""
    from oq2vl_jax.data.packing.bins import pack_rows

    return [(1, config.num_tokens, config.max_images)] * len(
        pack_rows(lengths, images, config.num_tokens, config.max_images)
    )


def padded(config: Tuning, lengths: np.ndarray, images: np.ndarray, is_sorted: bool) -> list[tuple[int, int, int]]:
    """Returns (rows, tokens, image slots per row) of the padded batches: entries with pictures, then without, in random
    order, sorted within a global batch if is_sorted. Text-only batches carry an empty picture."""
    rng, batches = np.random.default_rng(config.seed), []
    for kind in (1, 0):
        of_kind = rng.permutation(np.flatnonzero(images == kind))
        for first in range(0, len(of_kind), config.global_batch):
            chosen = lengths[of_kind[first : first + config.global_batch]]
            chosen = np.sort(chosen)[::-1] if is_sorted else chosen
            for start in range(0, len(chosen), config.device_batch):
                part = chosen[start : start + config.device_batch]
                batches.append((len(part), int(part.max()), 1))
    return batches


def bucketed(tokens: int, config: Tuning) -> int:
    return min(-(-tokens // BUCKET) * BUCKET, config.num_tokens)


def step_seconds(config: Tuning, rows: int, num_tokens: int, slots: int) -> float:
    """Returns the median seconds of loss and gradients for a batch of this shape, with half of the text labelled."""
    import jax

    from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
    from oq2vl_jax.sharding import make_mesh
    from oq2vl_jax.train.checks import check_memory
    from oq2vl_jax.train.gradients import loss_and_gradients

    train = train_config(config, rows, num_tokens, slots)
    check_memory(train, make_mesh(train.mesh))
    model = OpenQwen2VL(jax.random.key(0), train.model)
    mesh = make_mesh(train.mesh)
    step = jax.jit(lambda model, batch: loss_and_gradients(model, batch, train, mesh))
    batch = make_batch(config, rows, num_tokens, slots)
    jax.block_until_ready(step(model, batch))
    seconds = []
    for _ in range(config.repeats):
        start = time.perf_counter()
        jax.block_until_ready(step(model, batch))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def train_config(config: Tuning, rows: int, num_tokens: int, slots: int) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            vision=VisionConfig(216, 8, 64, 256, 3, 2),
            decoder=DecoderConfig(8192, config.width, 4 * config.width, config.layers, config.width // 64, 1, 64),
            num_visual_tokens=VISUAL_TOKENS,
            image_token_id=IMAGE_TOKEN,
        ),
        data=DataConfig(num_tokens=num_tokens, max_images=slots),
        optimizer=OptimizerConfig(1e-4, 0.0),
        num_steps=1,
        global_batch_size=rows,
        run_dir="",
        compute_dtype="float32",
    )


def make_batch(config: Tuning, rows: int, num_tokens: int, slots: int):
    from oq2vl_jax.data.loading.batch import IGNORE, Batch

    rng = np.random.default_rng(config.seed)
    document = min(num_tokens, num_tokens // slots) if slots > 1 else num_tokens
    tokens = rng.integers(2, 8192, (rows, num_tokens)).astype(np.int32)
    segments = np.minimum(np.arange(num_tokens) // document, slots - 1) + 1
    positions = np.arange(num_tokens) - (segments - 1) * document
    is_image = positions < min(VISUAL_TOKENS, document)
    tokens[:, is_image] = IMAGE_TOKEN
    labels = np.where(is_image | (rng.random((rows, num_tokens)) < 0.5), IGNORE, tokens).astype(np.int32)
    shape = (rows, num_tokens)
    pixels = rng.integers(0, 256, (rows, slots, 216, 216, 3), dtype=np.uint8)
    return Batch(tokens, labels, as_rows(positions, shape), as_rows(segments, shape), pixels)


def as_rows(values: Iterable[int], shape: tuple[int, int]) -> np.ndarray:
    return np.broadcast_to(np.asarray(values, np.int32), shape)
