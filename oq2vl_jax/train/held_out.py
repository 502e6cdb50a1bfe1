"""Evaluates held-out rows during training: their loss, and a page of generated answers beside their references."""

import dataclasses
import html
import itertools
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from oq2vl_jax.config import DataConfig, OnlineConfig, TrainConfig
from oq2vl_jax.data.loading.batch import IGNORE
from oq2vl_jax.data.loading.loader import make_loader
from oq2vl_jax.data.loading.mixture import short_names
from oq2vl_jax.data.packing.packed import PackedRows, check_files, tokenizer_folder
from oq2vl_jax.data.packing.rows import PackedRow, decode_row
from oq2vl_jax.data.samples.thumbnail import picture
from oq2vl_jax.data.text.codec import TextCodec
from oq2vl_jax.generate.generator import Generator, Request
from oq2vl_jax.generate.reply import SamplingOptions
from oq2vl_jax.html import page
from oq2vl_jax.model.adapters import merged
from oq2vl_jax.model.layers import Compute
from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
from oq2vl_jax.paths import write_text
from oq2vl_jax.sharding import row_sharding, to_global_batch
from oq2vl_jax.train.gradients import total_loss
from oq2vl_jax.train.step import state_shardings
from oq2vl_jax.train.trackers import Sampled

SAMPLE_SEED = 0
STYLE = (
    "<style>article{border-top:1px solid #e6eaf0;padding:12px 0;display:flex;gap:20px}article figure{margin:0}"
    "article img{max-width:220px;max-height:180px;border-radius:4px}article p{margin:.2em 0;overflow-wrap:anywhere;"
    "white-space:pre-line}</style>"
)


class HeldOut:
    """Evaluates a model during training, on the same rows and the same samples every time."""

    def __init__(self, config: TrainConfig, mesh: Mesh, compute: Compute | None = None):
        """Raises UserError if the held-out rows do not fit the configuration."""
        self._config, self._mesh = config, mesh
        self._data: DataConfig = dataclasses.replace(
            config.data, kind="packed", sources=config.held_out.sources, weights=(), online=OnlineConfig()
        )
        for path in self._data.sources:
            check_files(path, is_whole=self._data.verify == "full")
        make_loader(self._data, config.model, config.global_batch_size, SAMPLE_SEED).close()
        self._codec = TextCodec.load(str(tokenizer_folder(self._data.sources[0])))

        shardings = (state_shardings(config, mesh).model, row_sharding(mesh))
        self._loss_sum = jax.jit(
            lambda model, batch: total_loss(model, batch, config, mesh, compute), in_shardings=shardings
        )

    def losses(self, model: OpenQwen2VL) -> dict[str, float]:
        """Returns held_out_loss, and held_out_loss/NAME of each source if there are several."""
        found = {"held_out_loss": self.loss(model)}
        sources = self._data.sources
        if len(sources) > 1:
            for name, source in zip(short_names(sources), sources, strict=True):
                found[f"held_out_loss/{name}"] = self.loss(model, (source,))
        return found

    def loss(self, model: OpenQwen2VL, sources: tuple[str, ...] | None = None) -> float:
        """Returns nats per labelled token over held_out.num_batches global batches, of some sources or of all."""
        config = self._config
        data = self._data if sources is None else dataclasses.replace(self._data, sources=sources)
        loader = make_loader(
            data, config.model, config.global_batch_size, SAMPLE_SEED, jax.process_index(), jax.process_count()
        )
        total, num_labelled = 0.0, 0
        try:
            for _, batch in zip(range(config.held_out.num_batches), loader, strict=False):
                placed = to_global_batch(batch, self._mesh)
                total += float(self._loss_sum(model, placed))
                num_labelled += int((placed.labels != IGNORE).sum())
        finally:
            loader.close()
        return total / max(num_labelled, 1)

    def samples(self, model: OpenQwen2VL) -> list[Sampled]:
        """Generates the model's answers in place of the first labelled turn of some held-out documents."""
        config = self._config
        image, per_image = self._codec.special.image, config.model.num_visual_tokens
        every = (document for row in self._rows() for document in documents_of(row, image, per_image))
        documents = list(itertools.islice(every, config.held_out.num_samples))
        if not documents:
            return []
        generator = Generator.of_model(
            merged(model), config.model, config.data.template, self._codec, self._mesh, config.compute_dtype
        )
        requests = [Request(prompt, images) for prompt, _, images in documents]
        replies = generator.generate(requests, SamplingOptions(config.held_out.max_new_tokens))
        return [
            Sampled(
                self._codec.decode([token for token in prompt if token != image]).strip(),
                reply.text.strip(),
                self._codec.decode(reference).strip(),
                images,
            )
            for (prompt, reference, images), reply in zip(documents, replies, strict=True)
        ]

    def _rows(self):
        """Yields packed rows, source by source, in a fixed random order."""
        for path in self._data.sources:
            source = PackedRows(path)
            for i in np.random.default_rng(SAMPLE_SEED).permutation(len(source)).tolist():
                yield decode_row(source[i])


def documents_of(row: PackedRow, image_id: int, per_image: int) -> list[tuple[list[int], list[int], list[bytes]]]:
    """Returns (prompt, reference, images) per document with a label: all before its first answer, and that answer.

    The text of a caption is all labelled, so its prompt is <s> and the picture. Later pictures are left out.
    """
    documents, start, first_image = [], 0, 0
    for length in row.lengths:
        tokens, is_labelled = row.tokens[start : start + length], row.is_labelled[start : start + length]
        num_images = int((tokens == image_id).sum()) // per_image
        images = row.images[first_image : first_image + num_images]
        start, first_image = start + length, first_image + num_images
        labelled = np.flatnonzero(is_labelled[1:]) + 1  # nothing predicts the first token
        if not len(labelled):
            continue
        begin = int(labelled[0])
        gap = np.flatnonzero(~is_labelled[begin:])
        end = begin + int(gap[0]) if len(gap) else length
        shown = images[: int((tokens[:begin] == image_id).sum()) // per_image]
        documents.append((tokens[:begin].tolist(), tokens[begin:end].tolist(), shown))
    return documents


def write_samples(path: Path, step: int, loss: float, samples: list[Sampled]) -> None:
    """Writes the page at `path`, which is RUN_DIR/samples/STEP.html."""
    articles = [
        f"<article><div>{''.join(picture(image, '') for image in sample.images)}</div><div>"
        f"<p>{html.escape(sample.prompt)}</p><p><b>{html.escape(sample.reply) or '<i>empty</i>'}</b></p>"
        f"<p class='good'>{html.escape(sample.reference)}</p></div></article>"
        for sample in samples
    ]
    lead = f"held-out loss {loss:.4f}; below, what the model writes (bold) beside the reference (green)"
    path.parent.mkdir(exist_ok=True)
    write_text(str(path), page(f"Step {step}", lead, [STYLE, *articles]))
