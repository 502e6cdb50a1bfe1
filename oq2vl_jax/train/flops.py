"""Floating-point operations of a step, by the model's own formula. MFU = model FLOPs / seconds / the device's peak.

Model FLOPs count what the mathematics needs for real tokens and real images, never padding and never recomputation: a
multiplication and an addition are two, a trained matrix costs three times its forward pass, a frozen one below trained
parts two, a frozen one with nothing to train below it one (arXiv 2204.02311, appendix B):

    decoder     2 x matrix parameters of the layers x tokens
    logits      2 x V x D x tokens                    every position, though only labelled ones are computed
    attention   4 x N x H x L x query-key pairs       pairs of a document of n tokens: n (n + 1) / 2
    vision      2 x matrix parameters x patches + 4 x width x P^2 a block, of the blocks that run
    projector   2 x its parameters x visual tokens

Executed FLOPs come nearer to what the device is asked to do: logits of labelled positions only, layers computed again
for the backward pass, images that pad the last chunk of the encoder. What attention computes beyond its pairs (masked
parts of tiles, scores again in its backward pass) is left out: it is under 1 % of a row of captions.
"""

from typing import NamedTuple

from oq2vl_jax.config import TrainConfig
from oq2vl_jax.model.open_qwen2vl import IMAGES_PER_CHUNK

TEXT_TOKENS = {"plain": 27, "conversation": 260}
"""Text tokens of a typical document with one image: captions as in the published mixture, conversations as in LLaVA."""


def text_tokens(config: TrainConfig) -> int:
    return TEXT_TOKENS["plain" if config.data.template == "plain" else "conversation"]


class Work(NamedTuple):
    """Real contents of some rows. pairs: query-key pairs that attention sees, over the rows."""

    tokens: float
    images: float
    pairs: float
    labelled: float


class Flops(NamedTuple):
    """FLOPs by part, for the whole of some rows."""

    decoder: float
    logits: float
    attention: float
    vision: float
    projector: float

    @property
    def total(self) -> float:
        return sum(self)


def typical_row(config: TrainConfig, text_tokens_per_image: int | None = None) -> Work:
    """A full row of documents of one image and some text each, the text labelled; with attention_scope row they are
    one document, and without images the row is. None: the text of a typical one."""
    tokens, text_tokens_per_image = config.data.num_tokens, text_tokens_per_image or text_tokens(config)
    images = min(config.data.max_images, tokens / (config.model.num_visual_tokens + text_tokens_per_image))
    if images == 0:
        return Work(tokens, 0, tokens * (tokens + 1) / 2, tokens)
    length = tokens if config.data.attention_scope == "row" else tokens / images
    return Work(tokens, images, tokens * (length + 1) / 2, images * text_tokens_per_image)


def forward_flops(config: TrainConfig, work: Work) -> Flops:
    """One forward pass over `work`."""
    decoder, vision, model = config.model.decoder, config.model.vision, config.model
    q_dim, kv_dim = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    layer = decoder.hidden_size * (2 * q_dim + 2 * kv_dim + 3 * decoder.intermediate_size)
    block = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
    patches, num_blocks = vision.num_patches, vision.num_layers - 1
    embedding = 2 * patches * 3 * vision.patch_size**2 * vision.hidden_size
    an_image = embedding + num_blocks * (2 * patches * block + 4 * patches**2 * vision.hidden_size)
    projector = decoder.hidden_size * (vision.hidden_size + decoder.hidden_size)
    return Flops(
        decoder=2 * decoder.num_layers * layer * work.tokens,
        logits=2 * decoder.vocab_size * decoder.hidden_size * work.tokens,
        attention=4 * q_dim * decoder.num_layers * work.pairs,
        vision=an_image * work.images,
        projector=2 * projector * model.num_visual_tokens * work.images,
    )


def model_flops(config: TrainConfig, work: Work) -> Flops:
    """Forward and backward, as the mathematics needs them."""
    trained = config.trainable
    forward = forward_flops(config, work)
    vision = 3 if trained.vision else 1
    projector = 3 if trained.projector else 2 if trained.vision else 1
    decoder = 3 if trained.decoder else 2
    return Flops(
        decoder * forward.decoder,
        decoder * forward.logits,
        3 * forward.attention,
        vision * forward.vision,
        projector * forward.projector,
    )


def executed_flops(config: TrainConfig, work: Work, rows_per_microbatch: int, rows: float) -> Flops:
    """What the device is asked to do for `rows` rows of contents `work`, by config.remat."""
    needed, forward = model_flops(config, work), forward_flops(config, work)
    again = config.remat in ("full", "attention")
    microbatches = rows / rows_per_microbatch
    padding = (IMAGES_PER_CHUNK - 1) / 2 * microbatches / max(work.images, 1)
    vision_again = forward.vision if config.trainable.vision and again else 0.0
    return Flops(
        decoder=needed.decoder + (forward.decoder if again else 0.0),
        logits=3 * forward.logits * work.labelled / max(work.tokens, 1),
        attention=needed.attention + (forward.attention if config.remat == "full" else 0.0),
        vision=(needed.vision + vision_again) * (1 + padding),
        projector=needed.projector,
    )
