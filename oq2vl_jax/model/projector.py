"""The kinds of projectors: patch features of the encoder to the decoder's embeddings, in two steps.

    reduce      [I P vision] -> [I M reduced]   no parameters; the encoder runs it on the chunks that hold images
    __call__    [I M reduced] -> [I M D]        the map, once for all images

Average pooling follows torch.nn.AdaptiveAvgPool2d: along each side, output bin i averages the inputs floor(i * n / m)
to ceil((i + 1) * n / m), so bins overlap if m does not divide n. Pixel shuffle puts squares of s x s patches side by
side into one visual token; a grid that s does not divide gets zeros at its end, as in the mlp_downsample of VILA
(github.com/NVlabs/VILA). Seven patches a side, to three bins and to squares of 2:

    patches  0 1 2 3 4 5 6         patches   0 1 2 3 4 5 6 -      - = zeros
    bin 0    x x x                 token 0   x x
    bin 1        x x x             token 1       x x
    bin 2            x x x         ..
"""

import functools
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from oq2vl_jax import own_code
from oq2vl_jax.config import ModelConfig, shuffle_side
from oq2vl_jax.errors import UserError
from oq2vl_jax.model.layers import Linear, gelu
from oq2vl_jax.trees import is_matrix


class Projector(Protocol):
    """What a projector has; made by Kind(key, config)."""

    def reduce(self, patches: Float[Array, "I P vision_dim"]) -> Float[Array, "I M reduced_dim"]: ...
    def __call__(self, reduced: Float[Array, "I M reduced_dim"]) -> Float[Array, "I M D"]: ...


class Mlp(nnx.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, key: Array, in_dim: int, width: int):
        keys = jax.random.split(key, 2)
        self.fc1 = Linear(keys[0], in_dim, width, ("embed", "mlp"), in_dim**-0.5)
        self.fc2 = Linear(keys[1], width, width, ("mlp", "embed"), width**-0.5)

    def __call__(self, reduced: Float[Array, "I M reduced_dim"]) -> Float[Array, "I M D"]:
        return self.fc2(gelu(self.fc1(reduced)))


class AvgPoolMlp(Mlp):
    """The "avgpool" projector of Open-Qwen2VL: its weights fit any number of visual tokens."""

    def __init__(self, key: Array, config: ModelConfig):
        super().__init__(key, config.vision.hidden_size, config.decoder.hidden_size)
        self.num_visual_tokens = config.num_visual_tokens

    def reduce(self, patches: Float[Array, "I P vision_dim"]) -> Float[Array, "I M vision_dim"]:
        return adaptive_average_pool(patches, self.num_visual_tokens)


class AvgPoolLinear(nnx.Module):
    """Average pooling and one linear layer."""

    def __init__(self, key: Array, config: ModelConfig):
        vision_dim, width = config.vision.hidden_size, config.decoder.hidden_size
        self.fc1 = Linear(key, vision_dim, width, ("embed", "mlp"), vision_dim**-0.5)
        self.num_visual_tokens = config.num_visual_tokens

    def reduce(self, patches: Float[Array, "I P vision_dim"]) -> Float[Array, "I M vision_dim"]:
        return adaptive_average_pool(patches, self.num_visual_tokens)

    def __call__(self, reduced: Float[Array, "I M vision_dim"]) -> Float[Array, "I M D"]:
        return self.fc1(reduced)


class PixelShuffleMlp(Mlp):
    """Pixel shuffle instead of pooling; the first layer reads s^2 patches."""

    def __init__(self, key: Array, config: ModelConfig):
        side = shuffle_side(config)
        assert side is not None, "ModelConfig checks it"
        super().__init__(key, side**2 * config.vision.hidden_size, config.decoder.hidden_size)
        self.side = side

    def reduce(self, patches: Float[Array, "I P vision_dim"]) -> Float[Array, "I M shuffled_dim"]:
        return pixel_shuffle(patches, self.side)


PROJECTORS: dict[str, Any] = {
    "avg_pool_mlp": AvgPoolMlp,
    "avg_pool_linear": AvgPoolLinear,
    "pixel_shuffle_mlp": PixelShuffleMlp,
}


def make_projector(key: Array, config: ModelConfig) -> Any:
    """Returns a fresh projector of config.projector. Raises UserError if one of the researcher's own does not fit."""
    own = config.projector.own
    if own is None:
        return PROJECTORS[config.projector.kind](key, config)
    projector = own_code.load(own)(key, config)
    check_own(projector, config)
    return projector


def check_own(projector: Any, config: ModelConfig) -> None:
    """Raises UserError unless the projector has the two methods, names the axes of its parameters, and makes
    num_visual_tokens vectors of the decoder's width of an image."""
    own = config.projector.own
    if not callable(projector) or not callable(getattr(projector, "reduce", None)):
        raise UserError(f"model.projector.own = {own}: lacks reduce or __call__.")
    parameters = jax.tree.leaves(projector, is_leaf=lambda node: isinstance(node, nnx.Param))
    if not all(isinstance(x, nnx.Param) and hasattr(x, "axes") for x in parameters):
        raise UserError(
            f"model.projector.own = {own}: a parameter does not name its axes; use Linear or param of "
            "oq2vl_jax/model/layers.py."
        )
    patches = jax.ShapeDtypeStruct((2, config.vision.num_patches, config.vision.hidden_size), jnp.float32)
    made = jax.eval_shape(lambda patches: projector(projector.reduce(patches)), patches).shape
    expected = (2, config.num_visual_tokens, config.decoder.hidden_size)
    if made != expected:
        raise UserError(
            f"model.projector.own = {config.projector.own} makes {made} of {patches.shape}; expected {expected}: "
            "images, model.num_visual_tokens, model.decoder.hidden_size."
        )


def adaptive_average_pool(features: Float[Array, "I P D"], num_tokens: int) -> Float[Array, "I M D"]:
    """Pools a square grid of P patches to a square grid of M = num_tokens; if M = P it returns its input."""
    num_images, num_patches, dim = features.shape
    if num_patches == num_tokens:
        return features
    pool = jnp.asarray(pooling_matrix(math.isqrt(num_patches), math.isqrt(num_tokens)), features.dtype)
    grid = features.reshape(num_images, pool.shape[1], pool.shape[1], dim)
    pooled = jnp.einsum("Iyxd,Yy,Xx->IYXd", grid, pool, pool)
    return pooled.reshape(num_images, num_tokens, dim)


def pixel_shuffle(features: Float[Array, "I P D"], side: int) -> Float[Array, "I M sideD"]:
    """Puts the features of squares of side x side patches side by side, row by row; zeros fill up the last squares."""
    num_images, num_patches, dim = features.shape
    grid = math.isqrt(num_patches)
    num_squares = -(-grid // side)
    padding = (0, num_squares * side - grid)
    padded = jnp.pad(features.reshape(num_images, grid, grid, dim), ((0, 0), padding, padding, (0, 0)))
    squares = padded.reshape(num_images, num_squares, side, num_squares, side, dim).swapaxes(2, 3)
    return squares.reshape(num_images, num_squares**2, side**2 * dim)


def pooling_matrix(num_inputs: int, num_bins: int) -> np.ndarray:
    """Returns [num_bins, num_inputs]; row i averages the inputs of bin i."""
    matrix = np.zeros((num_bins, num_inputs), np.float32)
    for i in range(num_bins):
        start, end = i * num_inputs // num_bins, -(-(i + 1) * num_inputs // num_bins)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


@functools.lru_cache
def projector_flops(config: ModelConfig) -> int:
    """Returns the forward FLOPs of an image: 2 x elements of matrices x visual tokens."""
    projector = jax.eval_shape(lambda: make_projector(jax.random.key(0), config))
    parameters = jax.tree.leaves(projector, is_leaf=lambda node: isinstance(node, nnx.Param))
    matrices = [x for x in parameters if isinstance(x, nnx.Param) and is_matrix(x)]
    return 2 * sum(math.prod(matrix.get_value().shape) for matrix in matrices) * config.num_visual_tokens
