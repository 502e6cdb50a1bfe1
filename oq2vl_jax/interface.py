"""The Python interface: a model from a checkpoint or an export, and batches from pictures and texts.

model = oq2vl_jax.load("runs/pretrain")
model.ask(["cat.jpg"], "What is this?")
model.loss([{"images": ["cat.jpg"], "text": "a cat"}])
"""

import io
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oq2vl_jax import own_code
from oq2vl_jax.config import CheckpointDescription, DataConfig, MeshConfig, Template, Weights
from oq2vl_jax.config_files import name_of
from oq2vl_jax.data.loading.batch import Batch
from oq2vl_jax.data.loading.loader import RowDecoder
from oq2vl_jax.data.packing.rows import pack_documents
from oq2vl_jax.data.samples.chats import with_turns
from oq2vl_jax.data.samples.images import ImageError, check_image
from oq2vl_jax.data.samples.shards import Sample
from oq2vl_jax.data.text.codec import SampleError, TextCodec
from oq2vl_jax.errors import UserError
from oq2vl_jax.generate.generator import Generator
from oq2vl_jax.generate.loading import open_model
from oq2vl_jax.generate.reply import SamplingOptions
from oq2vl_jax.model.layers import Compute
from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
from oq2vl_jax.sharding import make_mesh
from oq2vl_jax.train.loss import loss

MODES_OF_PNG = {"1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"}
Picture = str | os.PathLike | bytes | np.ndarray | Any
"""A path, the contents of a file, a uint8 array [height, width, 3], or a PIL image."""


class LoadedModel:
    """A model in memory. model: the nnx module, float32; config: its architecture; codec: its tokenizer; template: of
    its conversations; dtype: of activations and matrix products."""

    def __init__(
        self,
        model: OpenQwen2VL,
        description: CheckpointDescription,
        codec: TextCodec,
        template: Template | None,
        dtype: str,
    ):
        self.model, self.config, self.codec, self.dtype = model, description.model, codec, dtype
        self.template, self.origin = template or description.template, description.origin
        self._made: tuple[OpenQwen2VL, Generator] | None = None

    def ask(self, images: Sequence[Picture], text: str, **options: Any) -> str:
        """Returns the reply to a question about images, which stand before it. options: as in SamplingOptions.

        Raises UserError for a picture that cannot be used.
        """
        try:
            return self._generator.ask(text, pictures_of(images), SamplingOptions(**options))
        except ImageError as problem:
            raise UserError(f"an image cannot be used: {problem}.") from problem

    def loss(self, samples: Sequence[Any] | Batch) -> float:
        """Returns the mean cross entropy per labelled token, in nats. samples: as for batch_of, or a Batch."""
        return float(_mean_loss(self.model, self._batch(samples), self.dtype))

    def hidden(self, samples: Sequence[Any] | Batch) -> Float[Array, "B T D"]:
        """Returns the decoder's final hidden states. samples: as for batch_of, or a Batch."""
        return _hidden(self.model, self._batch(samples), self.dtype)

    def _batch(self, samples: Sequence[Any] | Batch) -> Batch:
        return samples if isinstance(samples, Batch) else batch_of(samples, like=self)

    @property
    def _generator(self) -> Generator:
        """Made when it is first used, and again for another model."""
        if self._made is None or self._made[0] is not self.model:
            mesh = make_mesh(MeshConfig())
            made = Generator.of_model(self.model, self.config, self.template, self.codec, mesh, self.dtype)
            self._made = self.model, made
        return self._made[1]


def load(
    path: str | os.PathLike,
    *,
    weights: Weights = "model",
    projector: Callable | str | None = None,
    template: Template | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> LoadedModel:
    """Loads a checkpoint, a run directory (its newest checkpoint), RUN@STEP, an export of convert.to_hf, or a hub id.

    weights: "ema" takes the averaged ones of a run. projector: the class, or FILE.py:NAME, of a projector of your own
    that the model was trained with. template: of the conversations; default: that of the training data. dtype: default
    float32 on CPUs, bfloat16 elsewhere. Raises UserError.
    """
    for name, value, allowed in (("weights", weights, Weights), ("template", template or "plain", Template)):
        if value not in get_args(allowed):
            raise UserError(f"load: {name} is {value!r}, expected {name_of(allowed)}.")
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    name = own_code.hand_over(projector) if callable(projector) else projector
    opened = open_model(str(path), weights, name)
    return LoadedModel(opened.read(make_mesh(MeshConfig())), opened.description, opened.codec, template, dtype)


def batch_of(samples: Sequence[Any], like: LoadedModel) -> Batch:
    """Returns a Batch with a row for each sample, padded to the longest, for the model `like`.

    A sample is {"images": [..], "text": caption}, {"images": [..], "turns": [question, answer, ..]} or a Sample of
    data/samples; pictures that no <image> places come before the first question. Pictures are read as a run with the
    default options of its data reads them. Raises UserError that names the sample by its number.
    """
    if not samples:
        raise UserError("batch_of: no samples.")
    documents = []
    for number, sample in enumerate(samples):
        try:
            sample = sample if isinstance(sample, Sample) else sample_of(sample, str(number))
            sample = with_turns(sample)
            documents.append(like.codec.document(sample, like.template, like.config.num_visual_tokens))
        except SampleError as problem:
            raise UserError(f"sample {number}: {problem.reason}.") from problem
    longest = max(len(document.tokens) for document in documents)
    data = DataConfig(num_tokens=longest, max_images=max(len(document.images) for document in documents))
    decoder = RowDecoder(data, like.config, like.codec.special.pad)
    rows = []
    for number, document in enumerate(documents):
        for image in document.images:
            try:
                check_image(image)
            except ImageError as problem:
                raise UserError(f"sample {number}: an image cannot be used: {problem}.") from problem
        rows.append(decoder.map(pack_documents([document])))
    return Batch(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))


def sample_of(fields: Any, key: str) -> Sample:
    """Returns the Sample of a dictionary as in batch_of."""
    is_known = isinstance(fields, dict) and not set(fields) - {"images", "text", "turns"}
    texts: Any = None
    if is_known:
        texts = [fields["text"]] if "text" in fields else fields.get("turns")
    is_text = isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)
    if not is_text or ("text" in fields and "turns" in fields):
        raise UserError(f'sample {key}: expected {{"images": [..], "text": ..}} or {{"images": [..], "turns": [..]}}.')
    try:
        images = pictures_of(fields.get("images", ()))
    except UserError as error:
        raise UserError(f"sample {key}: {error}") from error
    if "text" in fields:
        return Sample(key, images, text=fields["text"])
    if len(texts) % 2:
        raise UserError(f"sample {key}: the last of {len(texts)} turns is a question without an answer.")
    speakers = ("human", "gpt")
    conversations = [{"from": speakers[i % 2], "value": turn} for i, turn in enumerate(texts)]
    return Sample(key, images, conversations=conversations)


def pictures_of(images: Any) -> list[bytes]:
    """Returns the contents of each picture of a list. Raises UserError for anything else."""
    if not isinstance(images, list | tuple):
        raise UserError(f"images are a list of pictures, got {type(images).__name__}.")
    return [bytes_of(image) for image in images]


def bytes_of(picture: Picture) -> bytes:
    """Returns the contents of an image file; arrays and PIL images become PNGs, which keep every pixel."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | os.PathLike):
        try:
            return Path(picture).read_bytes()
        except OSError as error:
            raise UserError(f"{os.fspath(picture)}: cannot be read ({error.strerror}).") from error
    from PIL import Image

    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
            raise UserError(f"a picture is an array uint8 [height, width, 3], got {picture.dtype} {picture.shape}.")
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        raise UserError(f"a picture is a path, bytes, an array or a PIL image, got {type(picture).__name__}.")
    exif = picture.getexif()
    if picture.mode not in MODES_OF_PNG:
        picture = picture.convert("RGB")
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    return file.getvalue()


@partial(jax.jit, static_argnames="dtype")
def _mean_loss(model: OpenQwen2VL, batch: Batch, dtype: str) -> Float[Array, ""]:
    total, number = loss(model, batch, Compute(jnp.dtype(dtype)))
    return total / jnp.maximum(number, 1)


@partial(jax.jit, static_argnames="dtype")
def _hidden(model: OpenQwen2VL, batch: Batch, dtype: str) -> Float[Array, "B T D"]:
    return model(batch.tokens, batch.images, batch.segment_ids, batch.positions, Compute(jnp.dtype(dtype)))
