"""Low-rank adapters (LoRA, arXiv 2106.09685) of linear layers: y = x W + b + alpha / rank * (x A) B, W and b frozen.

    W [in, out]     kernel, of the base        A [in, rank]   lora_a, drawn as in PEFT
                                               B [rank, out]  lora_b, zero: an adapted model begins as its base

The linear layers of the decoder's and encoder's blocks and of the projector can have adapters; the patch embedding, the
token tables and norms have none.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from oq2vl_jax.config import LoraConfig
from oq2vl_jax.errors import UserError
from oq2vl_jax.model.layers import Linear, param
from oq2vl_jax.trees import is_matrix, path_name

ADAPTERS = ("lora_a", "lora_b")
NOT_ADAPTED = ("patch_embedding",)


class AdaptedLinear(Linear):
    """A linear layer, or a stack of them, with an adapter. scale: alpha / rank."""

    def __init__(self, linear: Linear, key: Array, rank: int, alpha: float):
        self.kernel, self.bias = linear.kernel, linear.bias
        *leading, in_dim, out_dim = self.kernel.shape
        *names, in_axis, out_axis = self.kernel.axes
        a = jax.random.uniform(key, (*leading, in_dim, rank), jnp.float32, -1, 1) * in_dim**-0.5
        self.lora_a = param(a, (*names, in_axis, "rank"))
        self.lora_b = param(jnp.zeros((*leading, rank, out_dim)), (*names, "rank", out_axis))
        self.scale = alpha / rank

    def __call__(self, x: Float[Array, "*batch in_dim"]) -> Float[Array, "*batch out_dim"]:
        x2 = x.reshape(-1, x.shape[-1])
        low = x2 @ self.lora_a[...].astype(x.dtype)
        change = jnp.asarray(self.scale, x.dtype) * (low @ self.lora_b[...].astype(x.dtype))
        return super().__call__(x) + change.reshape(*x.shape[:-1], -1)

    @property
    def base(self) -> Linear:
        return plain(self.kernel, self.bias)

    def merged(self) -> Linear:
        """Returns the linear layer that computes the same, but for the rounding of its kernel."""
        kernel = merged_kernel(self.kernel[...], self.lora_a[...], self.lora_b[...], self.scale)
        return plain(param(kernel, self.kernel.axes), self.bias)


def merged_kernel(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """Returns W + scale * A B in the type of W, computed in float32; of a stack one layer after another, so that no
    float32 copy of the whole stack exists."""

    def of_layer(layer: tuple[Array, Array, Array]) -> Array:
        wide, a, b = (x.astype(jnp.float32) for x in layer)
        return (wide + scale * jnp.matmul(a, b, precision="highest")).astype(kernel.dtype)

    return jax.lax.map(of_layer, (kernel, a, b)) if kernel.ndim > 2 else of_layer((kernel, a, b))


def plain(kernel: nnx.Param, bias: nnx.Param | None) -> Linear:
    linear = Linear(jax.random.key(0), 1, 1, ("embed", "embed"), 0.0, bias is not None)
    linear.kernel, linear.bias = kernel, bias
    return linear


def with_adapters(model: Any, config: LoraConfig, key: Array, base_dtype: DTypeLike = jnp.float32) -> Any:
    """Returns a model whose target parts have adapters. base_dtype: of the other matrices, which are frozen. Raises
    UserError for a part without a linear layer."""
    assert config.rank is not None
    rank, found = config.rank, set()

    def adapted(path, node):
        if (
            not isinstance(node, Linear)
            or path[0].name not in config.targets
            or getattr(path[-1], "name", None) in NOT_ADAPTED
        ):
            return node
        found.add(path[0].name)
        return AdaptedLinear(node, jax.random.fold_in(key, number_of(path_name(path))), rank, config.alpha)

    def cast(node):
        is_cast = isinstance(node, nnx.Param) and is_matrix(node)
        return node.replace(node.get_value().astype(base_dtype)) if is_cast else node

    model = jax.tree.map(cast, model, is_leaf=lambda node: isinstance(node, nnx.Param))
    model = jax.tree_util.tree_map_with_path(adapted, model, is_leaf=lambda node: isinstance(node, Linear))
    if missing := [part for part in config.targets if part not in found]:
        raise UserError(f"lora.targets: {', '.join(missing)} has no linear layer that an adapter could change.")
    return model


def number_of(name: str) -> int:
    """Returns a number of a layer's name, so that its A does not depend on which other layers have adapters."""
    return int.from_bytes(name.encode()) % (2**31 - 1)


def is_adapter(path: Iterable[Any]) -> bool:
    """Whether the path of a parameter is that of an adapter."""
    return any(getattr(key, "name", None) in ADAPTERS for key in path)


def without_adapters(model: Any) -> Any:
    """Returns the base of a model with adapters: the model itself if it has none."""
    return _each_adapted(model, lambda linear: linear.base)


def merged(model: Any) -> Any:
    """Returns the model without adapters that computes the same: the model itself if it has none."""
    return _each_adapted(model, lambda linear: linear.merged())


def _each_adapted(model: Any, change: Any) -> Any:
    def changed(node):
        return change(node) if isinstance(node, AdaptedLinear) else node

    return jax.tree.map(changed, model, is_leaf=lambda node: isinstance(node, AdaptedLinear))
