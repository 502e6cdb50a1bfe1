"""The architecture, and the published model."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from oq2vl_jax.bounds import CountOrZero, Depth, Length, Positive, Share, Side, Vocabulary, Width, check_bounds
from oq2vl_jax.config.roles import INITIAL
from oq2vl_jax.errors import UserError


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP encoder. Features come from the second-to-last block; the last of `num_layers` is not built."""

    image_size: Side
    patch_size: Side
    hidden_size: Width
    intermediate_size: Width
    num_layers: Depth
    num_heads: Depth
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """gelu: exact, as timm trained the published checkpoint. gelu_tanh: as in Hugging Face's SigLIP config."""
    layer_norm_eps: Share = 1e-6
    patch_init_gain: Positive = field(default=1.0, metadata=INITIAL)
    """Standard deviation of a fresh patch embedding, in units of patch_dim ** -0.5. The small models of the demo learn
    shapes with 3: after 28k pictures of easy-VQA, gain 1/4 had 48 % right, gain 1 had 75 % and gain 3 had 89 %."""

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.patches_per_side**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class DecoderConfig:
    """Dense decoder of the Qwen family (model/qwen2.py)."""

    vocab_size: Vocabulary
    hidden_size: Width
    intermediate_size: Width
    num_layers: Depth
    num_heads: Depth
    num_kv_heads: Depth
    head_dim: Width
    rope_theta: Positive = 1e6
    rope_inv_freq: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 rounds the rotary inverse frequencies as the published code does."""
    rms_norm_eps: Share = 1e-6
    tie_word_embeddings: bool = True
    kind: Literal["qwen2", "qwen3"] = "qwen2"
    """qwen2 (Qwen2.5 too): biases of q, k and v. qwen3: none, and q and k are normalised before they are rotated."""
    qkv_bias: bool | None = None
    """Biases of q, k and v. None: as the kind; another value is an architecture without an export."""
    qk_norm: bool | None = None
    """RMSNorm of every head of q and k, over head_dim (arXiv 2302.05442). None: as the kind, like qkv_bias."""

    @property
    def has_qkv_bias(self) -> bool:
        return self.kind == "qwen2" if self.qkv_bias is None else self.qkv_bias

    @property
    def has_qk_norm(self) -> bool:
        return self.kind == "qwen3" if self.qk_norm is None else self.qk_norm

    @property
    def is_published_kind(self) -> bool:
        """Whether a decoder of its kind alone, as its publishers define it, computes the same."""
        return (self.has_qkv_bias, self.has_qk_norm) == (self.kind == "qwen2", self.kind == "qwen3")


@dataclass(frozen=True)
class ProjectorConfig:
    """Patch features to visual tokens (model/projector.py)."""

    kind: Literal["avg_pool_mlp", "avg_pool_linear", "pixel_shuffle_mlp"] = "avg_pool_mlp"
    """avg_pool_mlp, as published: adaptive average pooling, then a 2-layer MLP. avg_pool_linear: one linear layer
    instead. pixel_shuffle_mlp: squares of patches side by side in one visual token, then a 2-layer MLP."""
    own: str | None = None
    """FILE.py:NAME of a projector in place of the kind (docs/extend.md)."""


@dataclass(frozen=True)
class ModelConfig:
    """SigLIP -> projector to `num_visual_tokens` an image -> Qwen2 or Qwen3."""

    vision: VisionConfig
    decoder: DecoderConfig
    num_visual_tokens: Length
    """Visual tokens per image; a square number. 144 in pre-training, 729 in tuning, with the same weights. With
    pixel_shuffle_mlp it decides the side of the squares: 2 x 2 patches make 196 of 729."""
    image_token_id: CountOrZero
    """Token id of the placeholder of a visual token. Qwen2.5: <|image_pad|> = 151655."""
    projector: ProjectorConfig = ProjectorConfig()

    def __post_init__(self):
        check_bounds(self, prefix="model.")
        check_square("model.num_visual_tokens", self.num_visual_tokens)
        if self.vision.hidden_size % self.vision.num_heads:
            raise UserError(
                f"model.vision.num_heads = {self.vision.num_heads} does not divide "
                f"hidden_size = {self.vision.hidden_size}."
            )
        if self.decoder.num_heads % self.decoder.num_kv_heads:
            raise UserError(
                f"model.decoder.num_kv_heads = {self.decoder.num_kv_heads} does not divide "
                f"num_heads = {self.decoder.num_heads}."
            )
        if self.decoder.head_dim % 2:
            raise UserError(f"model.decoder.head_dim = {self.decoder.head_dim} is odd; rotary positions turn pairs.")
        if self.vision.num_layers < 2:
            raise UserError("model.vision.num_layers = 1; features leave the second-to-last layer, so 2 is the least.")
        if self.num_visual_tokens > self.vision.num_patches:
            raise UserError(
                f"model.num_visual_tokens = {self.num_visual_tokens} is more than the {self.vision.num_patches} "
                f"patches of a picture (image_size {self.vision.image_size}, patch_size {self.vision.patch_size})."
            )
        if self.projector.kind == "pixel_shuffle_mlp" and self.projector.own is None:
            check_shuffle(self)
        if self.image_token_id >= self.decoder.vocab_size:
            raise UserError(
                f"model.image_token_id = {self.image_token_id} is outside the vocabulary of {self.decoder.vocab_size}."
            )

    def spelled_out(self) -> "ModelConfig":
        """Returns the same model with nothing left to the decoder's kind, so that two of them can be compared."""
        decoder = self.decoder
        decoder = dataclasses.replace(decoder, qkv_bias=decoder.has_qkv_bias, qk_norm=decoder.has_qk_norm)
        return dataclasses.replace(self, decoder=decoder)

    @staticmethod
    def open_qwen2vl_2b(num_visual_tokens: int = 144) -> "ModelConfig":
        """The published model: SigLIP-SO400M/14-384 and Qwen2.5-1.5B-Instruct (arXiv 2504.00595)."""
        return ModelConfig(
            vision=VisionConfig(
                image_size=384, patch_size=14, hidden_size=1152, intermediate_size=4304, num_layers=27, num_heads=16
            ),
            decoder=DecoderConfig(
                vocab_size=151_936,
                hidden_size=1536,
                intermediate_size=8960,
                num_layers=28,
                num_heads=12,
                num_kv_heads=2,
                head_dim=128,
            ),
            num_visual_tokens=num_visual_tokens,
            image_token_id=151_655,
        )


def check_square(name: str, number: int) -> None:
    side = math.isqrt(max(number, 0))
    if number < 1 or side * side != number:
        raise UserError(
            f"{name} = {number} is no square number; the pooling grid is square. "
            f"Nearest: {side**2 or 1} or {(side + 1) ** 2}."
        )


def shuffle_side(config: ModelConfig) -> int | None:
    """Returns the side of the squares of patches that pixel shuffle puts into one visual token; None if none fits."""
    return next(
        (side for side, tokens in shuffled_tokens(config.vision).items() if tokens == config.num_visual_tokens), None
    )


def shuffled_tokens(vision: VisionConfig) -> dict[int, int]:
    """Returns {side of the squares: visual tokens}; a grid that the squares do not divide is padded."""
    grid = vision.patches_per_side
    return {side: (-(-grid // side)) ** 2 for side in range(1, grid + 1)}


def check_shuffle(config: ModelConfig) -> None:
    if shuffle_side(config) is None:
        grid = config.vision.patches_per_side
        numbers = list(dict.fromkeys(map(str, shuffled_tokens(config.vision).values())))
        raise UserError(
            f"model.num_visual_tokens = {config.num_visual_tokens} does not follow from a pixel shuffle of {grid} x "
            f"{grid} patches; squares of 1, 2, 3, .. patches a side give {', '.join(numbers)}."
        )
