"""Packs raw samples into rows while training, without a packed folder on disk. Its state is restored exactly.

    samples, shuffled ─► documents ─► windows of 512 ─► pack_rows (data/packing/bins.py) ─► rows, shuffled ─► batches

Samples are read by their offset in the file, so the order is a function of the seed alone. The state is two integers:
the samples read before this window, and the rows of the window that were already given out. Deviation: Grain's own
best-fit packing fills 0.93 of a row on conversations with 729-token pictures and closes all its bins at once; a window
of 512 documents through the packer of data/pack.py fills 0.95 (docs/experiments.md). Offline packing fills more, knows
its counts beforehand and costs no time while training. Runs of several processes need it.
"""

import functools
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from oq2vl_jax import paths
from oq2vl_jax.config import DataConfig, ModelConfig
from oq2vl_jax.data.loading.batch import NUM_PREFETCHED_BATCHES, Batch
from oq2vl_jax.data.packing.bins import pack_rows
from oq2vl_jax.data.packing.documents import Limits, make_document
from oq2vl_jax.data.packing.rows import PackedRow, pack_documents
from oq2vl_jax.data.samples.formats import format_of
from oq2vl_jax.data.samples.formats.format import Reading
from oq2vl_jax.data.samples.images import ImageError
from oq2vl_jax.data.samples.shards import Sample
from oq2vl_jax.data.text.codec import SampleError, TextCodec
from oq2vl_jax.data.text.document import Document
from oq2vl_jax.data.text.tokenizer import tokenizer_sha256
from oq2vl_jax.errors import UserError

MAX_SKIPPED_IN_A_ROW = 10_000
"""So many consecutive samples without a document mean a mistake in the configuration, and raise UserError."""


class Skipped(NamedTuple):
    """Takes the place of the document if a sample cannot be used."""

    reason: str


class SampleSource:
    """Random access to the samples of instruction files, tars and parquet files."""

    def __init__(self, sources: tuple[str, ...], reading: Reading):
        """Finds every sample of the files, which takes seconds per gigabyte. Raises UserError."""
        self.files = [file for source in sources for file in paths.expand_paths("data.sources", source)]
        self.reading = reading
        formats = [indexed_format(file) for file in self.files]
        spans = [offsets(file) for file, (offsets, _) in zip(self.files, formats, strict=True)]
        self._readers = [read_one for _, read_one in formats]
        self._file_of = np.repeat(np.arange(len(spans)), [len(span) for span in spans])
        self._spans = np.concatenate(spans)
        if not len(self._spans):
            raise UserError(f"data.sources: {', '.join(sources)} hold no samples.")

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, i: int) -> Sample:
        number, (begin, end) = self._file_of[i], self._spans[i].tolist()
        return self._readers[number](self.files[number], begin, end, self.reading)


def indexed_format(file: str) -> tuple[Callable, Callable]:
    """Returns (offsets, read_one) of a file's format. Raises UserError for a format without them."""
    kind = format_of(file)
    if kind.offsets is None or kind.read_one is None:
        raise UserError(f"data.sources: {file} cannot be packed while training; pack it with oq2vl_jax.data.pack.")
    return kind.offsets, kind.read_one


def online_fingerprint(data: DataConfig, tokenizer: Path) -> str:
    """Returns a digest of the raw samples, the tokenizer and the settings that the loader's state depends on."""
    files = [file for source in data.sources for file in paths.expand_paths("data.sources", source)]
    versions = [[file, *paths.file_version(file)] for file in files]
    settings = [data.num_tokens, data.max_images, data.template, data.online.images, data.online.window]
    settings += [list(data.online.columns)] if data.online.columns else []
    settings.append(tokenizer_sha256(tokenizer))
    return hashlib.sha256(json.dumps([versions, settings]).encode()).hexdigest()


class ToDocument(grain.transforms.Map):
    """Turns a sample into its document, or into Skipped with the reason."""

    def __init__(self, codec: TextCodec, limits: Limits):
        self.codec, self.limits = codec, limits

    def map(self, element: Sample) -> Document | Skipped:
        try:
            return make_document(element, self.codec, self.limits)[0]
        except (SampleError, ImageError) as problem:
            return Skipped(problem.reason)


class DropSkipped(grain.IterDataset):
    """Yields the documents only; skipped samples are counted by reason in `skipped`."""

    def __init__(self, parent: grain.IterDataset, skipped: Counter):
        super().__init__(parent)
        self.skipped = skipped

    def __iter__(self) -> "DropSkippedIterator":
        return DropSkippedIterator(self._parent.__iter__(), self.skipped)


class DropSkippedIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, skipped: Counter):
        super().__init__(parent)
        self.skipped = skipped

    def __next__(self) -> Document:
        for _ in range(MAX_SKIPPED_IN_A_ROW):
            element = next(self._parent)
            if isinstance(element, Document):
                return element
            self.skipped[element.reason] += 1
        raise UserError(f"{MAX_SKIPPED_IN_A_ROW:,} samples in a row could not be used: {dict(self.skipped)}.")

    def get_state(self) -> Any:
        return self._parent.get_state()

    def set_state(self, state: Any) -> None:
        self._parent.set_state(state)


def pack_window(documents: Sequence[Document], num_tokens: int, max_images: int) -> list[PackedRow]:
    """Packs a window of documents into rows and shuffles them, because pack_rows returns long documents first."""
    tokens = [len(document.tokens) for document in documents]
    rows = pack_rows(tokens, [len(document.images) for document in documents], num_tokens, max_images)
    order = np.random.default_rng(tokens).permutation(len(rows))
    return [pack_documents([documents[i] for i in rows[row]]) for row in order]


class GiveOutRows(grain.experimental.FlatMapTransform):
    max_fan_out = sys.maxsize

    def flat_map(self, element: list[PackedRow]) -> list[PackedRow]:
        return element


def prepare_tokenizer(data: DataConfig, folder: Path) -> Path:
    """Declares this project's tokens in the tokenizer and writes it to `folder`, for the checkpoints."""
    assert data.online.tokenizer is not None, "DataConfig.problems"
    codec = TextCodec.load(data.online.tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() != Path(data.online.tokenizer).resolve():
        codec.save(folder)
    return folder


class OnlineLoader:
    """Yields endless batches packed on the fly; its interface is that of the iterator of make_loader."""

    def __init__(self, data: DataConfig, model: ModelConfig, batch_size: int, seed: int, tokenizer: Path):
        from oq2vl_jax.data.loading.loader import RowDecoder, threads_of

        codec = TextCodec.load(str(tokenizer))
        if codec.special.image != model.image_token_id or codec.vocab_size > model.decoder.vocab_size:
            raise UserError(
                f"data.online.tokenizer {tokenizer}: image token {codec.special.image} and {codec.vocab_size} entries; "
                f"the model has {model.image_token_id} and {model.decoder.vocab_size}."
            )
        self.skipped: Counter[str] = Counter()
        """Samples skipped since this process began, counted by reason; prefetched samples are included."""
        limits = Limits(data.template, data.num_tokens, data.max_images, model.num_visual_tokens)
        samples: Any = SampleSource(data.sources, Reading(data.online.images, data.online.columns))
        documents = grain.MapDataset.source(samples).seed(seed).shuffle().repeat().map(ToDocument(codec, limits))
        num_threads = threads_of(data)
        reading = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * num_threads)
        used = DropSkipped(documents.to_iter_dataset(reading), self.skipped)
        pack = functools.partial(pack_window, num_tokens=data.num_tokens, max_images=data.max_images)
        windows = used.batch(data.online.window, batch_fn=pack)
        rows = grain.experimental.FlatMapIterDataset(windows, GiveOutRows())
        batches = rows.map(RowDecoder(data, model, codec.special.pad)).batch(batch_size, drop_remainder=True)
        self._iterator = iter(
            grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=NUM_PREFETCHED_BATCHES)
        )

    def __iter__(self) -> "OnlineLoader":
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> Any:
        return self._iterator.get_state()

    def set_state(self, state: Any) -> None:
        self._iterator.set_state(state)

    def close(self) -> None:
        self._iterator.close()
