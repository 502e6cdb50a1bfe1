"""Open-Qwen2VL (arXiv 2504.00595) for transformers >= 5.8: Llava with an average pool in front of the projector.

Everything is transformers' own Llava (SigLIP, linear / gelu / linear, Qwen2) except two options that LlavaConfig does
not have: `num_visual_tokens` pools the square grid of patch features, and `rope_inv_freq = "bfloat16"` rounds the
rotary inverse frequencies as the published training code did. Load it with trust_remote_code=True.
"""

import math

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding


class OpenQwen2VLConfig(LlavaConfig):
    model_type = "open_qwen2vl"

    num_visual_tokens: int = 144
    rope_inv_freq: str = "float32"


class PooledProjector(LlavaMultiModalProjector):
    """[images, patches, width] -> adaptive average pooling to num_visual_tokens -> linear, gelu, linear."""

    def __init__(self, config):
        super().__init__(config)
        self.side = math.isqrt(config.num_visual_tokens)

    def forward(self, image_features):
        images, patches, width = image_features.shape
        grid = image_features.transpose(1, 2).reshape(images, width, math.isqrt(patches), math.isqrt(patches))
        pooled = torch.nn.functional.adaptive_avg_pool2d(grid, self.side)
        return super().forward(pooled.flatten(2).transpose(1, 2).contiguous())  # for vLLM's CPU kernels


class RoundedRotaryEmbedding(Qwen2RotaryEmbedding):
    """Rounds the inverse frequencies to bfloat16, whatever the dtype of the model."""

    def forward(self, x, position_ids):
        self.inv_freq = self.inv_freq.to(torch.bfloat16).float()
        return super().forward(x, position_ids)


class OpenQwen2VLModel(LlavaModel):
    config: OpenQwen2VLConfig

    def __init__(self, config):
        super().__init__(config)
        if hasattr(self.vision_tower, "vision_model"):  # before 5.8, which would skip weights with our names
            raise ImportError("Open-Qwen2VL needs transformers 5.8 or newer")
        self.multi_modal_projector = PooledProjector(config)
        if config.rope_inv_freq == "bfloat16":
            self.language_model.rotary_emb = RoundedRotaryEmbedding(self.language_model.config)
        self.post_init()


class OpenQwen2VLForConditionalGeneration(LlavaForConditionalGeneration):
    config: OpenQwen2VLConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OpenQwen2VLModel(config)
        self.post_init()
