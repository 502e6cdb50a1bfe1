"""SigLIP vision encoder (arXiv 2303.15343; timm vit_so400m_patch14_siglip_384, Hugging Face SiglipVisionModel).

Deviation: the features are the output of the second-to-last block without the final norm, as Open-Qwen2VL uses them
(Hugging Face `hidden_states[-2]`). The last block, the final norm and the pooling head are left out.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt8

from oq2vl_jax.config import Attention, VisionConfig
from oq2vl_jax.model.attention import attention
from oq2vl_jax.model.clip_config import ClipTowerConfig
from oq2vl_jax.model.layers import (
    Compute,
    LayerNorm,
    Linear,
    broadcast,
    gelu,
    normal,
    remat_layer,
    run_layers,
    stack_layers,
)

ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # used by OpenAI's CLIP
}


class SiglipAttention(nnx.Module):
    def __init__(self, key: Array, config: VisionConfig | ClipTowerConfig):
        width, std = config.hidden_size, config.hidden_size**-0.5
        keys = jax.random.split(key, 4)
        self.q_proj = Linear(keys[0], width, width, ("embed", "heads"), std)
        self.k_proj = Linear(keys[1], width, width, ("embed", "heads"), std)
        self.v_proj = Linear(keys[2], width, width, ("embed", "heads"), std)
        self.out_proj = Linear(keys[3], width, width, ("heads", "embed"), std)
        self.head_dim = config.head_dim

    def __call__(
        self, x: Float[Array, "I P D"], mask: Bool[Array, "I P P"] | None = None, implementation: Attention = "xla"
    ) -> Float[Array, "I P D"]:
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (proj(x).reshape(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, mask, implementation).reshape(x.shape))


class SiglipMLP(nnx.Module):
    def __init__(self, key: Array, config: VisionConfig | ClipTowerConfig):
        width, hidden = config.hidden_size, config.intermediate_size
        keys = jax.random.split(key, 2)
        self.fc1 = Linear(keys[0], width, hidden, ("embed", "mlp"), width**-0.5)
        self.fc2 = Linear(keys[1], hidden, width, ("mlp", "embed"), hidden**-0.5)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "I P D"]) -> Float[Array, "I P D"]:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class SiglipBlock(nnx.Module):
    def __init__(self, key: Array, config: VisionConfig | ClipTowerConfig):
        attention_key, mlp_key = jax.random.split(key)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SiglipAttention(attention_key, config)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = SiglipMLP(mlp_key, config)

    def __call__(
        self, x: Float[Array, "I P D"], mask: Bool[Array, "I P P"] | None = None, implementation: Attention = "xla"
    ) -> Float[Array, "I P D"]:
        x = x + self.self_attn(self.layer_norm1(x), mask, implementation)
        return x + self.mlp(self.layer_norm2(x))


class SiglipEncoder(nnx.Module):
    """Maps images to patch features."""

    def __init__(self, key: Array, config: VisionConfig):
        patch_key, position_key, layers_key = jax.random.split(key, 3)
        patch_dim = 3 * config.patch_size**2
        std = config.patch_init_gain * patch_dim**-0.5
        self.patch_embedding = Linear(patch_key, patch_dim, config.hidden_size, ("patch", "embed"), std)
        self.position_embedding = normal(
            position_key, (config.num_patches, config.hidden_size), config.hidden_size**-0.5, ("position", "embed")
        )
        self.layers = stack_layers(partial(SiglipBlock, config=config), layers_key, config.num_layers - 1)
        self.config = config

    def __call__(self, pixels: Float[Array, "I height width 3"], compute: Compute = Compute()) -> Float[Array, "I P D"]:
        """Returns the features of the second-to-last block, in the dtype of `pixels`."""
        x = self.patch_embedding(patchify(pixels, self.config.patch_size))
        x = x + broadcast(self.position_embedding[...], x)

        def apply(x, layer):
            return layer(x, None, compute.attention)

        return run_layers(remat_layer(apply, compute.remat), x, self.layers)


def patchify(pixels: Float[Array, "I height width 3"], patch_size: int) -> Float[Array, "I P patch_dim"]:
    """Cuts images into patches, row by row; a margin that does not fill a patch is dropped (6 px at 384/14)."""
    side = pixels.shape[1] // patch_size
    pixels = pixels[:, : side * patch_size, : side * patch_size]
    patches = pixels.reshape(-1, side, patch_size, side, patch_size, 3).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(-1, side * side, patch_size * patch_size * 3)


def normalize(images: UInt8[Array, "*batch height width 3"], dtype: DTypeLike) -> Float[Array, "*batch height width 3"]:
    """Scales 0..255 to -1..1: SigLIP's mean 0.5 and standard deviation 0.5."""
    return (images.astype(jnp.float32) / 127.5 - 1.0).astype(dtype)


def encoder_flops(config: VisionConfig) -> int:
    """Returns the forward FLOPs of an image: 2 x matrix parameters x P, and 4 x width x P^2 a block that runs."""
    patches, num_blocks = config.num_patches, config.num_layers - 1
    block = config.hidden_size * (4 * config.hidden_size + 2 * config.intermediate_size)
    embedding = 2 * patches * 3 * config.patch_size**2 * config.hidden_size
    return embedding + num_blocks * (2 * patches * block + 4 * patches**2 * config.hidden_size)
