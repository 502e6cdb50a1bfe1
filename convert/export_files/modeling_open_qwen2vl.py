"""Open-Qwen2VL (arXiv 2504.00595) for transformers >= 5.8: Llava with other projectors.

Everything is transformers' own Llava (SigLIP, linear / gelu / linear, Qwen2 or Qwen3) except three options that
LlavaConfig does not have: `num_visual_tokens` of the square grid of patch features, made as `projector_kind` says, and
`rope_inv_freq = "bfloat16"`, which rounds the rotary inverse frequencies as the published training code did. Load it
with trust_remote_code=True.
"""

import math
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector


class OpenQwen2VLConfig(LlavaConfig):
    model_type = "open_qwen2vl"

    num_visual_tokens: int = 144
    projector_kind: str = "avg_pool_mlp"
    rope_inv_freq: str = "float32"


class Projector(LlavaMultiModalProjector):
    """[images, patches, width] -> num_visual_tokens, pooled or shuffled -> linear, gelu, linear, or one linear."""

    def __init__(self, config):
        super().__init__(config)
        self.kind, self.side = config.projector_kind, math.isqrt(config.num_visual_tokens)
        vision: Any = config.vision_config
        width = self.linear_1.out_features
        self.squares = -(-(vision.image_size // vision.patch_size) // self.side)
        if self.kind == "pixel_shuffle_mlp":
            self.linear_1 = torch.nn.Linear(self.squares**2 * vision.hidden_size, width)
        if self.kind == "avg_pool_linear":
            self.act, self.linear_2 = torch.nn.Identity(), torch.nn.Identity()

    def forward(self, image_features):
        images, patches, width = image_features.shape
        grid = image_features.transpose(1, 2).reshape(images, width, math.isqrt(patches), math.isqrt(patches))
        if self.kind == "pixel_shuffle_mlp":
            end = self.side * self.squares - grid.shape[-1]
            padded = torch.nn.functional.pad(grid, (0, end, 0, end))
            squares = padded.reshape(images, width, self.side, self.squares, self.side, self.squares)
            return super().forward(squares.permute(0, 2, 4, 3, 5, 1).reshape(images, self.side**2, -1))
        pooled = torch.nn.functional.adaptive_avg_pool2d(grid, self.side)
        return super().forward(pooled.flatten(2).transpose(1, 2).contiguous())  # for vLLM's CPU kernels


def rounded(rotary: torch.nn.Module) -> torch.nn.Module:
    """Returns the rotary embedding with inverse frequencies rounded to bfloat16, whatever the dtype of the model."""

    class RoundedRotaryEmbedding(type(rotary)):
        def forward(self, x, position_ids):
            self.inv_freq = self.inv_freq.to(torch.bfloat16).float()
            return super().forward(x, position_ids)

    return RoundedRotaryEmbedding(rotary.config)


class OpenQwen2VLModel(LlavaModel):
    config: OpenQwen2VLConfig

    def __init__(self, config):
        super().__init__(config)
        if hasattr(self.vision_tower, "vision_model"):  # before 5.8, which would skip weights with our names
            raise ImportError("Open-Qwen2VL needs transformers 5.8 or newer")
        self.multi_modal_projector = Projector(config)
        if config.rope_inv_freq == "bfloat16":
            self.language_model.rotary_emb = rounded(self.language_model.rotary_emb)
        self.post_init()


class OpenQwen2VLForConditionalGeneration(LlavaForConditionalGeneration):
    config: OpenQwen2VLConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OpenQwen2VLModel(config)
        self.post_init()
