"""A projector of one's own: a max pool, a norm and one linear layer, 4 visual tokens an image.

python -m oq2vl_jax.train tiny --run-dir runs/max_pool --model.projector.own docs/examples/own_projector.py:MaxPool
"""

import math

import jax.numpy as jnp
from flax import nnx

from oq2vl_jax.model.layers import Linear, RMSNorm


class MaxPool(nnx.Module):
    """Made by MaxPool(key, config) with the ModelConfig; its parameters name their axes (oq2vl_jax/sharding.py)."""

    def __init__(self, key, config):
        vision_dim, width = config.vision.hidden_size, config.decoder.hidden_size
        self.norm = RMSNorm(vision_dim, 1e-6)
        self.map = Linear(key, vision_dim, width, ("embed", "mlp"), vision_dim**-0.5)
        self.side = math.isqrt(config.num_visual_tokens)

    def reduce(self, patches):
        """Turns [images, patches, vision_dim] into [images, visual tokens, anything]; it has no parameters."""
        images, num_patches, dim = patches.shape
        square = math.isqrt(num_patches) // self.side
        grid = patches.reshape(images, self.side, square, self.side, square, dim)
        return grid.max(axis=(2, 4)).reshape(images, self.side**2, dim)

    def __call__(self, reduced):
        """Maps what reduce made to the decoder's width."""
        return self.map(self.norm(reduced).astype(jnp.result_type(reduced)))
