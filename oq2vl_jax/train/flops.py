"""Floating-point operations of a step, from the model's sizes. MFU = model FLOPs / seconds / the device's peak.

Model FLOPs count the arithmetic of real tokens and images, without padding or recomputation (arXiv 2204.02311,
appendix B). A multiplication and an addition are two. A trained matrix costs three times its forward pass, a frozen one
that gradients pass through twice, any other frozen one once (adapters' own products, 3 % at rank 16, are left out):

    decoder, logits, attention    model/qwen2.py
    vision                        model/siglip.py
    projector                     model/projector.py

Executed FLOPs estimate the work of the device: logits of labelled positions only, layers recomputed for the backward
pass, images that pad the last chunk of the encoder. They leave out what attention computes beyond its pairs (masked
parts of tiles, scores recomputed in its backward pass), which is under 1 % for a row of captions.
"""

from typing import NamedTuple

from oq2vl_jax.config import TrainConfig
from oq2vl_jax.model.open_qwen2vl import IMAGES_PER_CHUNK
from oq2vl_jax.model.projector import projector_flops
from oq2vl_jax.model.qwen2 import attention_flops, layer_flops, logits_flops
from oq2vl_jax.model.siglip import encoder_flops

TEXT_TOKENS = {"plain": 27, "conversation": 260}
"""Text tokens of a typical document with one image: captions as in the published mixture, conversations as in LLaVA."""


def text_tokens(config: TrainConfig) -> int:
    return TEXT_TOKENS["plain" if config.data.template == "plain" else "conversation"]


class Work(NamedTuple):
    """Contents of some rows, without padding. pairs: visible query-key pairs, summed over the rows."""

    tokens: float
    images: float
    pairs: float
    labelled: float


class Flops(NamedTuple):
    """FLOPs of each part of the model, summed over some rows."""

    decoder: float
    logits: float
    attention: float
    vision: float
    projector: float

    @property
    def total(self) -> float:
        return sum(self)


def typical_row(config: TrainConfig, text_tokens_per_image: int | None = None) -> Work:
    """Returns the contents of a full row; each document is one image and labelled text (None: text_tokens(config)).
    With attention_scope "row", or without images, the whole row is one document."""
    tokens, text_tokens_per_image = config.data.num_tokens, text_tokens_per_image or text_tokens(config)
    images = min(config.data.max_images, tokens / (config.model.num_visual_tokens + text_tokens_per_image))
    if images == 0:
        return Work(tokens, 0, tokens * (tokens + 1) / 2, tokens)
    length = tokens if config.data.attention_scope == "row" else tokens / images
    return Work(tokens, images, tokens * (length + 1) / 2, images * text_tokens_per_image)


def forward_flops(config: TrainConfig, work: Work) -> Flops:
    """Returns the FLOPs of one forward pass over `work`."""
    model = config.model
    return Flops(
        decoder=layer_flops(model.decoder) * work.tokens,
        logits=logits_flops(model.decoder) * work.tokens,
        attention=attention_flops(model.decoder) * work.pairs,
        vision=encoder_flops(model.vision) * work.images,
        projector=projector_flops(model) * work.images,
    )


def model_flops(config: TrainConfig, work: Work) -> Flops:
    """Returns the model FLOPs of a forward and a backward pass."""
    forward = forward_flops(config, work)
    of_trained = 3 if config.lora.rank is None else 2  # a base passes gradients on, and has none of its own
    trained = config.trained_parts
    vision = of_trained if "vision" in trained else 1
    projector = of_trained if "projector" in trained else 2 if "vision" in trained else 1
    decoder = of_trained if "decoder" in trained else 2
    return Flops(
        decoder * forward.decoder,
        decoder * forward.logits,
        3 * forward.attention,
        vision * forward.vision,
        projector * forward.projector,
    )


def executed_flops(config: TrainConfig, work: Work, rows_per_microbatch: int, rows: float) -> Flops:
    """Estimates the executed FLOPs for `rows` rows with contents `work` under config.remat."""
    needed, forward = model_flops(config, work), forward_flops(config, work)
    again = config.remat in ("full", "attention")
    microbatches = rows / rows_per_microbatch
    padding = (IMAGES_PER_CHUNK - 1) / 2 * microbatches / max(work.images, 1)
    vision_again = forward.vision if "vision" in config.trained_parts and again else 0.0
    return Flops(
        decoder=needed.decoder + (forward.decoder if again else 0.0),
        logits=(3 if config.lora.rank is None else 2) * forward.logits * work.labelled / max(work.tokens, 1),
        attention=needed.attention + (forward.attention if config.remat == "full" else 0.0),
        vision=(needed.vision + vision_again) * (1 + padding),
        projector=needed.projector,
    )
