"""Patch features to visual tokens: adaptive average pooling, then a 2-layer MLP (Open-Qwen2VL, "avgpool" projector).

Pooling follows torch.nn.AdaptiveAvgPool2d: along each side, output bin i averages the inputs floor(i * n / m) to
ceil((i + 1) * n / m), so bins overlap if m does not divide n. Seven inputs to three bins:

    inputs  0 1 2 3 4 5 6
    bin 0   x x x
    bin 1       x x x
    bin 2           x x x
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from oq2vl_jax.config import ModelConfig
from oq2vl_jax.model.layers import Linear, gelu


class Projector(nnx.Module):
    """Patch features to the decoder's embeddings in two steps: reduce, then map (the call).

    reduce has no parameters; the encoder runs it on the chunks that hold images, and the map runs once on all of them.
    """

    def __init__(self, key: Array, config: ModelConfig):
        vision_dim, width = config.vision.hidden_size, config.decoder.hidden_size
        keys = jax.random.split(key, 2)
        self.fc1 = Linear(keys[0], vision_dim, width, ("embed", "mlp"), vision_dim**-0.5)
        self.fc2 = Linear(keys[1], width, width, ("mlp", "embed"), width**-0.5)
        self.num_visual_tokens = config.num_visual_tokens

    def reduce(self, patches: Float[Array, "I P vision_dim"]) -> Float[Array, "I M vision_dim"]:
        """Pools the patches of each image to its visual tokens."""
        return adaptive_average_pool(patches, self.num_visual_tokens)

    def __call__(self, pooled: Float[Array, "I M vision_dim"]) -> Float[Array, "I M D"]:
        return self.fc2(gelu(self.fc1(pooled)))


def adaptive_average_pool(features: Float[Array, "I P D"], num_tokens: int) -> Float[Array, "I M D"]:
    """Pools a square grid of P patches to a square grid of M = num_tokens; if M = P it returns its input."""
    num_images, num_patches, dim = features.shape
    if num_patches == num_tokens:
        return features
    pool = jnp.asarray(pooling_matrix(math.isqrt(num_patches), math.isqrt(num_tokens)), features.dtype)
    grid = features.reshape(num_images, pool.shape[1], pool.shape[1], dim)
    pooled = jnp.einsum("Iyxd,Yy,Xx->IYXd", grid, pool, pool)
    return pooled.reshape(num_images, num_tokens, dim)


def pooling_matrix(num_inputs: int, num_bins: int) -> np.ndarray:
    """Returns [num_bins, num_inputs]; row i averages the inputs of bin i."""
    matrix = np.zeros((num_bins, num_inputs), np.float32)
    for i in range(num_bins):
        start, end = i * num_inputs // num_bins, -(-(i + 1) * num_inputs // num_bins)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def projector_flops(config: ModelConfig) -> int:
    """Returns the forward FLOPs of an image: 2 x parameters x visual tokens."""
    width = config.decoder.hidden_size
    return 2 * width * (config.vision.hidden_size + width) * config.num_visual_tokens
