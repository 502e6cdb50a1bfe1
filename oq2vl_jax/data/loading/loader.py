"""Loads packed shards as Batches: Grain over ArrayRecord, shuffled, mixed, decoded in threads, restored exactly.

The order of rows is a function of (seed, sources, weights) alone. The state of the loader is one integer, the number
of rows consumed over all processes, so it can be restored on any number of workers or processes.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from oq2vl_jax.config import DataConfig, ModelConfig
from oq2vl_jax.data.loading.batch import IGNORE, NUM_PREFETCHED_BATCHES, Batch
from oq2vl_jax.data.loading.mixture import mix
from oq2vl_jax.data.packing.packed import PackedRows, read_manifest, tokenizer_folder
from oq2vl_jax.data.packing.rows import PackedRow, decode_row
from oq2vl_jax.data.samples.images import ImageError, decode_image
from oq2vl_jax.data.text.tokenizer import tokenizer_sha256
from oq2vl_jax.errors import UserError


def make_loader(
    data: DataConfig,
    model: ModelConfig,
    global_batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> "grain.experimental.ElasticIterator":
    """Returns an endless iterator over this process's share of batches of `global_batch_size` rows.

    It has get_state() and set_state(). Raises UserError if a source was packed for another model or budget.
    """
    manifests = {path: read_manifest(path) for path in data.sources}
    check_sources(data, model, manifests)
    sources = []
    for i, path in enumerate(data.sources):
        rows: Any = PackedRows(path)
        sources.append(grain.MapDataset.source(rows).seed(seed + i).shuffle().repeat())
    mixed = mix(sources, data)
    pad_id = manifests[data.sources[0]]["pad_id"]
    workers = None
    if data.num_workers:
        from absl import flags

        flags.FLAGS.mark_as_parsed()  # otherwise Grain's workers refuse to start outside absl.app
        workers = grain.MultiprocessingOptions(num_workers=data.num_workers)
    return grain.experimental.ElasticIterator(
        mixed.map(RowDecoder(data, model, pad_id)),
        global_batch_size,
        grain.sharding.ShardOptions(process_index, process_count),
        read_options=grain.ReadOptions(num_threads=NUM_PREFETCHED_BATCHES, prefetch_buffer_size=NUM_PREFETCHED_BATCHES),
        multiprocessing_options=workers,
    )


def check_sources(data: DataConfig, model: ModelConfig, manifests: dict[str, dict]) -> None:
    """Compares the manifests with the configuration. Raises one UserError that lists every difference."""
    problems = []
    for path, manifest in manifests.items():
        expected = {
            "num_tokens": data.num_tokens,
            "max_images": data.max_images,
            "visual_tokens": model.num_visual_tokens,
            "image_id": model.image_token_id,
            "template": data.template,
        }
        problems += [
            f"{path}: {key} is {manifest.get(key)!r}, the config says {value!r}"
            for key, value in expected.items()
            if manifest.get(key) != value
        ]
        if tokenizer_sha256(tokenizer_folder(path)) != manifest["tokenizer_sha256"]:
            problems.append(f"{path}: its tokenizer folder is not the one it was packed with")
        if manifest["vocab_size"] > model.decoder.vocab_size:
            problems.append(f"{path}: vocabulary of {manifest['vocab_size']}, the model has {model.decoder.vocab_size}")
    if data.weights and (len(data.weights) != len(data.sources) or min(data.weights) <= 0):
        problems.append(
            f"weights are {data.weights}, expected a number above 0 for each of {len(data.sources)} sources"
        )
    if len({manifest["tokenizer_sha256"] for manifest in manifests.values()}) > 1:
        problems.append("the sources were packed with different tokenizers")
    if problems:
        raise UserError("data.sources do not fit the configuration: " + "; ".join(problems) + ".")


class RowDecoder(grain.transforms.Map):
    """Decodes a packed row, or its bytes, into one row of a Batch."""

    def __init__(self, data: DataConfig, model: ModelConfig, pad_id: int):
        self.data, self.model, self.pad_id = data, model, pad_id

    def map(self, element: bytes | PackedRow) -> Batch:
        row = decode_row(element) if isinstance(element, bytes) else element
        num_placeholders = int((row.tokens == self.model.image_token_id).sum())
        if num_placeholders != len(row.images) * self.model.num_visual_tokens:
            raise UserError(f"row of {row.keys[0]}: {len(row.images)} images but {num_placeholders} placeholders.")
        return Batch(*row_arrays(row, self.data, self.pad_id), self.decode_images(row))

    def decode_images(self, row: PackedRow) -> np.ndarray:
        size = self.model.vision.image_size
        images = np.zeros((self.data.max_images, size, size, 3), np.uint8)

        def decode(slot: int) -> None:
            try:
                images[slot] = decode_image(row.images[slot], size, self.data.exact_decoding, self.data.as_seen)
            except ImageError as problem:
                raise UserError(
                    f"image {slot} of the row of {row.keys[0]}: {problem}; pack the shards again."
                ) from problem

        num_threads = threads_of(self.data)
        decode_all = map if num_threads == 1 else decoding_pool(num_threads).map
        list(decode_all(decode, range(len(row.images))))
        return images


def threads_of(data: DataConfig) -> int:
    """Returns data.num_threads, or else the cores this process may use, divided among the worker processes."""
    return data.num_threads or max(1, len(os.sched_getaffinity(0)) // max(data.num_workers, 1))


@functools.lru_cache(maxsize=1)
def decoding_pool(num_threads: int) -> ThreadPoolExecutor:
    """Returns the process's one pool for decoding images; PIL releases the interpreter lock while it decodes."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix="decode")


def row_arrays(row: PackedRow, data: DataConfig, pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens, labels, positions, segment_ids of one row, each int32 [num_tokens]; batch.py has a drawing."""
    num_real, lengths = len(row.tokens), np.array(row.lengths)
    segment_ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions = np.arange(num_real) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    if data.attention_scope == "row":
        segment_ids, positions = np.ones(num_real, np.int64), np.arange(num_real)
    labels = np.full(num_real, IGNORE)
    is_target = row.is_labelled[1:] & (segment_ids[1:] == segment_ids[:-1])
    labels[:-1][is_target] = row.tokens[1:][is_target]

    def pad(values, fill):
        padded = np.full(data.num_tokens, fill, np.int32)
        padded[:num_real] = values
        return padded

    return pad(row.tokens, pad_id), pad(labels, IGNORE), pad(positions, 0), pad(segment_ids, 0)
