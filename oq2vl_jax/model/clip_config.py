"""Sizes of a CLIP. It scores data and is no part of a trained model, so it stands apart from config.py."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ClipTowerConfig:
    """One transformer of a CLIP."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"]
    """OpenAI's weights: quick_gelu."""
    layer_norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class ClipConfig:
    """CLIP (arXiv 2103.00020): an image and a text tower, compared by cosine similarity; used to score data only."""

    image_tower: ClipTowerConfig
    text_tower: ClipTowerConfig
    image_size: int
    patch_size: int
    vocab_size: int
    max_text_tokens: int
    projection_dim: int
    eos_id: int
    """The text's features are those of its first token with this id."""

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class ClipDescription:
    """What one needs to know of CLIP weights to run them."""

    model: ClipConfig
    origin: str
    """What they were converted from."""
