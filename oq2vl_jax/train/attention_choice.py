"""Chooses the attention of a run by device and row length, and checks the kernel on the device before using it.

GPU   kernel if it supports the head width, else blocked
CPU   xla for short rows, for which blocks are no faster (docs/experiments.md), else blocked
"""

import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from oq2vl_jax.config import Attention, TrainConfig
from oq2vl_jax.errors import UserError
from oq2vl_jax.model.attention import attention, packed_mask
from oq2vl_jax.model.attention_kernel import is_supported
from oq2vl_jax.model.layers import Compute
from oq2vl_jax.runtime import any_process, is_first_process

SHORT_ROW_TOKENS = 512
CHECK_LENGTHS = (163, 80, 72, 5)
RESULTS = ("output", "output with gradients", "dq", "dk", "dv")
CHECK_TOLERANCE = 0.02
"""Largest error relative to the largest value, in bfloat16. Its rounding is 0.004; a wrong mask gives 0.1 or more."""


class Choice(NamedTuple):
    name: Attention
    reason: str


def choose_attention(config: TrainConfig, mesh: Mesh) -> Choice:
    """Returns the implementation for the devices of a mesh from config.attention; runs nothing.

    Raises UserError for the kernel without a GPU.
    """
    device = next(iter(mesh.devices.flat))
    is_gpu = device.platform in ("gpu", "cuda")
    head_dim, num_tokens = config.model.decoder.head_dim, config.data.num_tokens
    if config.attention == "kernel" and not is_gpu:
        raise UserError(
            "attention = kernel needs a GPU; take auto, or kernel_interpreted, which runs the same kernel slowly."
        )
    if config.attention != "auto":
        return Choice(config.attention, "asked for")
    if is_gpu and is_supported(head_dim):
        return Choice("kernel", f"{device.device_kind}, heads of {head_dim}")
    if is_gpu:
        return Choice("blocked", f"{device.device_kind}, the kernel does not know heads of {head_dim}")
    if num_tokens <= SHORT_ROW_TOKENS:
        return Choice("xla", f"CPU, rows of {num_tokens} tokens")
    return Choice("blocked", f"CPU, rows of {num_tokens} tokens")


def compute_of(config: TrainConfig, mesh: Mesh) -> Compute:
    """Returns the execution options of a configuration on the devices of a mesh; runs nothing."""
    query_tile, key_tile = map(int, config.execution.tiles.split("x"))
    attention = choose_attention(config, mesh).name
    return Compute(jnp.dtype(config.compute_dtype), config.remat, attention, (query_tile, key_tile))


def checked_compute(config: TrainConfig, mesh: Mesh) -> Compute:
    """Returns compute_of's options, with the kernel only if it agrees with the reference on this device.

    Prints the choice; after a check that fails, warns and takes "blocked".
    """
    choice, compute = choose_attention(config, mesh), compute_of(config, mesh)
    name = choice.name
    if name == "kernel":
        problem = kernel_problem(config)
        if any_process(problem is not None):  # all processes must compile the same program
            name, problem = "blocked", problem or "it failed in another process"
            print(
                f"WARNING: attention kernel not used: {problem}. Using blocked attention.", file=sys.stderr, flush=True
            )
    if is_first_process():
        print(f"attention: {name} ({choice.reason})", file=sys.stderr, flush=True)
    return compute._replace(attention=name)


def kernel_problem(config: TrainConfig, implementation: Attention = "kernel") -> str | None:
    """Compares an implementation with the reference on the default device; returns the problem, or None.

    The inputs are a random row of three documents with the decoder's heads and two images with the encoder's heads and
    patches, in config.compute_dtype. Outputs and gradients are compared.
    """
    decoder, vision = config.model.decoder, config.model.vision
    segments = jnp.repeat(jnp.arange(1, 5), jnp.asarray(CHECK_LENGTHS))[None] % 4  # the last length is padding
    positions = jnp.concatenate([jnp.arange(length) for length in CHECK_LENGTHS])[None]
    cases = {
        "packed rows": (
            (1, sum(CHECK_LENGTHS)), (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim), (segments, positions),
        ),
        "images": ((2, vision.num_patches), (vision.num_heads, vision.num_heads, vision.head_dim), None),
    }  # fmt: skip
    for case, (shape, heads, documents) in cases.items():
        arrays = random_heads(shape, heads, config.compute_dtype)
        try:
            computed = values_and_gradients(implementation, documents, arrays)
        except Exception as error:  # compilers raise any type
            return f"{case}: it does not run here ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        expected = values_and_gradients("xla", documents, arrays)
        for name, ours, theirs in zip(RESULTS, computed, expected, strict=True):
            error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
            if not error < CHECK_TOLERANCE:
                return f"{case}: {name} differs from the reference by {error:.3g} of its largest value"
    return None


def random_heads(shape: tuple[int, int], heads: tuple[int, int, int], dtype: str) -> list[jax.Array]:
    """Draws q, k, v and the cotangent of the output. shape: (rows, tokens). heads: (N, K, H)."""
    num_heads, num_kv_heads, head_dim = heads
    rng = np.random.default_rng(0)
    numbers = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    return [jnp.asarray(rng.normal(size=(*shape, n, head_dim)), dtype) for n in numbers]


def values_and_gradients(
    implementation: Attention, documents: tuple[jax.Array, jax.Array] | None, arrays: list[jax.Array]
) -> list[np.ndarray]:
    """Returns the arrays named in RESULTS, 0 at padding. documents: (segment_ids, positions), or None for images."""
    is_real = True if documents is None else (documents[0] > 0)[..., None, None]

    @jax.jit
    def run(q, k, v, cotangent):
        def attended(q, k, v):
            mask = None if documents is None else packed_mask(*documents, implementation)
            return jnp.where(is_real, attention(q, k, v, mask, implementation), 0)

        value, pull_back = jax.vjp(attended, q, k, v)
        return attended(q, k, v), value, *pull_back(jnp.where(is_real, cotangent, 0).astype(value.dtype))

    return [np.asarray(x, np.float32) for x in run(*arrays)]
