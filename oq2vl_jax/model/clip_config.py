"""Configuration of CLIP, kept apart from config/ because CLIP only scores data and is never trained here."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ClipTowerConfig:
    """Sizes of one CLIP transformer, image or text."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"]
    """OpenAI's weights use quick_gelu."""
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
    """The text features are read at the first token with this id."""

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class ClipDescription:
    """Description file of converted CLIP weights: their configuration and source."""

    model: ClipConfig
    origin: str
    """Weights that these were converted from."""
