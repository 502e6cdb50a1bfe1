"""Parameters and the basic layers of all models.

A module holds parameters and static configuration only and is a plain pytree: jax.jit, jax.grad and jax.lax.scan take
it as it is. Parameters are float32 masters; a layer casts them to the type of its input when it uses them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from oq2vl_jax.config import Attention

Layer = TypeVar("Layer", bound=nnx.Module)

ATTENTION_NAMES = ("attention_output", "attention_log_norm")
"""jax checkpoint names of the residuals of packed attention. The reference names only its output, and recomputes its
scores in the backward pass."""


class Compute(NamedTuple):
    """Execution options; they affect results only through rounding.

    dtype: of activations and matrix products. remat: as in config.TrainConfig. attention: of packed rows and of images.
    tiles: tokens per query tile and per key tile of the attention kernel.
    gather: all-gathers a decoder layer from its shards (FSDP); None if the weights are already whole.
    """

    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    attention: Attention = "xla"
    tiles: tuple[int, int] = (64, 64)
    gather: Callable[[Any], Any] | None = None


def param(value: Array, axes: tuple[str | None, ...]) -> nnx.Param:
    """Makes a parameter with a logical name per axis; sharding.py maps the names to mesh axes."""
    assert value.ndim == len(axes), (value.shape, axes)
    return nnx.Param(value, axes=axes)


def normal(key: Array, shape: tuple[int, ...], std: float, axes: tuple[str | None, ...]) -> nnx.Param:
    return param(std * jax.random.normal(key, shape, jnp.float32), axes)


def broadcast(vector: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Broadcasts a parameter to the shape and type of x so that its gradient is summed in float32.

    The sum over tokens would otherwise run in the type of x where a device adds in it. With such sums in bfloat16 the
    worst gradient of a step on an H200, over 4,096 tokens, was wrong by 33 % of its largest value.
    """
    exact = vector.astype(x.dtype).astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.broadcast_to(exact, x.shape).astype(x.dtype)


class Linear(nnx.Module):
    """y = x @ kernel + bias, kernel stored [in, out]."""

    is_transposed: bool = False

    def __init__(self, key: Array, in_dim: int, out_dim: int, axes: tuple[str, str], std: float, use_bias: bool = True):
        self.kernel = normal(key, (in_dim, out_dim), std, axes)
        self.bias = param(jnp.zeros(out_dim), (axes[1],)) if use_bias else None

    def __call__(self, x: Float[Array, "*batch in_dim"]) -> Float[Array, "*batch out_dim"]:
        kernel = self.kernel[...].astype(x.dtype)
        x2 = x.reshape(-1, x.shape[-1])  # flat: XLA's CPU backward of the 3-axis form takes 1.7 times as long
        y = jax.lax.dot_general(x2, kernel, (((1,), (1,)), ((), ()))) if self.is_transposed else x2 @ kernel
        if self.bias is not None:
            y = y + broadcast(self.bias[...], y)
        return y.reshape(*x.shape[:-1], -1)

    def transposed(self) -> "Linear":
        """Returns the same map with the kernel stored [out, in]; on few rows (decoding) a CPU takes 0.75 the time."""
        linear = jax.tree.map(lambda x: x, self)
        linear.kernel = param(self.kernel[...].T, self.kernel.axes[-2:][::-1])
        linear.is_transposed = True
        return linear


def side_by_side(*linears: Linear) -> Linear:
    """Joins maps of the same input into one matrix product with concatenated outputs; also for stacked layers."""
    joined = jax.tree.map(lambda x: x, linears[0])
    for name in ("kernel", "bias"):
        parts = [getattr(linear, name) for linear in linears]
        if parts[0] is not None:
            setattr(joined, name, parts[0].replace(jnp.concatenate([part[...] for part in parts], axis=-1)))
    return joined


def split_columns(linear: Linear, widths: tuple[int, ...]) -> list[Linear]:
    """Inverse of side_by_side for maps with `widths` outputs."""
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    columns = [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]
    return [jax.tree.map(lambda x, part=part: x[..., part], linear) for part in columns]


def gelu(x: Float[Array, "*batch dim"], approximate: bool = False) -> Float[Array, "*batch dim"]:
    """Computes x times the normal CDF of x in float32 and rounds once, as PyTorch does.

    jax.nn.gelu rounds every step to the type of x, and a GPU then reads bfloat16 activations three times. Its erfc
    takes 83 instructions an element on a GPU, erf 32. approximate: uses the tanh formula.
    """
    x32 = x.astype(jnp.float32)
    if approximate:
        return jax.nn.gelu(x32).astype(x.dtype)
    return (0.5 * x32 * (1 + jax.lax.erf(x32 * 0.5**0.5))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Computed in float32, returned in the type of x."""

    def __init__(self, dim: int, eps: float):
        self.scale = param(jnp.ones(dim), ("norm",))
        self.bias = param(jnp.zeros(dim), ("norm",))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps) * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Normalises in float32, rounds to the type of x, and scales in that type, as Hugging Face does."""

    def __init__(self, dim: int, eps: float):
        self.scale = param(jnp.ones(dim), ("norm",))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * broadcast(self.scale[...], x)


def stack_layers(make_layer: Callable[[Array], Layer], key: Array, num_layers: int) -> Layer:
    """Makes num_layers layers as one module whose parameters have a leading axis "layers"; run_layers takes it."""
    layers = jax.vmap(make_layer)(jax.random.split(key, num_layers))

    def name_leading_axis(variable):
        return variable.replace(variable[...], axes=("layers", *variable.axes))

    return jax.tree.map(name_leading_axis, layers, is_leaf=lambda node: isinstance(node, nnx.Param))


def unstacked(layers: Layer, num_layers: int) -> tuple[Layer, ...]:
    """Splits a stack into its layers, each with its own arrays."""
    return tuple(jax.tree.map(lambda x, i=i: x[i], layers) for i in range(num_layers))


def stacked(layers: tuple[Layer, ...]) -> Layer:
    """Inverse of unstacked."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)


def run_layers(apply: Callable[[Array, Layer], Array], x: Array, layers: Layer | tuple[Layer, ...]) -> Array:
    """Applies the layers in order: x = apply(x, layer).

    A stack is scanned, which halves compile time. A tuple of layers runs faster: a scan copies every weight out of its
    stack, every saved activation into a stack and out again, and every gradient (docs/experiments.md).
    """
    if not isinstance(layers, tuple):
        return jax.lax.scan(lambda x, layer: (apply(x, layer), None), x, layers)[0]
    for layer in layers:
        x = apply(x, layer)
    return x


def remat_layer(apply: Callable, remat: str, is_gathered: bool = False) -> Callable:
    """Wraps a layer so that its backward pass recomputes what the policy `remat` (config.TrainConfig) does not keep."""
    policies = jax.checkpoint_policies
    named = policies.save_only_these_names(*ATTENTION_NAMES)
    if remat == "none":
        return jax.checkpoint(apply, policy=all_but_gathered) if is_gathered else apply
    kept = {
        "dots": policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, named),
        "attention": named,
        "full": None,
    }
    return jax.checkpoint(apply, policy=kept[remat])


def all_but_gathered(primitive, *_, **__) -> bool:
    """Checkpoint policy that saves everything except all-gathered weights, which are gathered again."""
    return primitive.name != "all_gather"
