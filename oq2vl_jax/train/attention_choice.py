"""Which attention a run uses: by device and row length, and checked on the device before it is trusted.

GPU   kernel where its shapes allow, else blocked
CPU   xla for short rows, where blocks do not pay (docs/experiments.md), else blocked
"""

import dataclasses
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from oq2vl_jax.config import TrainConfig
from oq2vl_jax.model.attention import attention, packed_mask
from oq2vl_jax.model.attention_kernel import is_supported
from oq2vl_jax.runtime import is_first_process

SHORT_ROW_TOKENS = 512
CHECK_TOLERANCE = 0.02
"""Largest error over the largest value in bfloat16, whose rounding is 0.004; a wrong mask gives 0.1 and more."""


class Choice(NamedTuple):
    name: str
    reason: str


def choose_attention(config: TrainConfig, mesh: Mesh) -> Choice:
    """The implementation for the devices of a mesh, by config.attention; nothing is run."""
    device = next(iter(mesh.devices.flat))
    is_gpu = device.platform in ("gpu", "cuda")
    head_dim, num_tokens = config.model.decoder.head_dim, config.data.num_tokens
    if config.attention == "kernel" and not is_gpu:
        return Choice("kernel_interpreted", "asked for; interpreted, as there is no GPU: for tests only")
    if config.attention != "auto":
        return Choice(config.attention, "asked for")
    if is_gpu and is_supported(head_dim):
        return Choice("kernel", f"{device.device_kind}, heads of {head_dim}")
    if is_gpu:
        return Choice("blocked", f"{device.device_kind}, the kernel does not know heads of {head_dim}")
    if num_tokens <= SHORT_ROW_TOKENS:
        return Choice("xla", f"CPU, rows of {num_tokens} tokens")
    return Choice("blocked", f"CPU, rows of {num_tokens} tokens")


def checked_attention(config: TrainConfig, mesh: Mesh) -> TrainConfig:
    """`config` with its attention decided: the kernel has to agree with the reference on this device first.

    Says what was chosen; falls back to "blocked", loudly, where the check fails.
    """
    choice = choose_attention(config, mesh)
    name = choice.name
    if name == "kernel":
        problem = kernel_problem(config)
        if problem:
            name = "blocked"
            print(
                f"WARNING: attention kernel not used: {problem}. Using blocked attention.", file=sys.stderr, flush=True
            )
    if is_first_process():
        print(f"attention: {name} ({choice.reason})", flush=True)
    return dataclasses.replace(config, attention="kernel" if name == "kernel_interpreted" else name)


def kernel_problem(config: TrainConfig, implementation: str = "kernel", num_tokens: int = 320) -> str | None:
    """What is wrong with an implementation on the default device, against the reference; None if nothing is.

    Forward and gradients of a random row of several documents, with the heads of the model, in its type.
    """
    decoder, rng = config.model.decoder, np.random.default_rng(0)
    lengths = (num_tokens // 2 + 3, num_tokens // 4, num_tokens - 5 - num_tokens // 2 - 3 - num_tokens // 4)
    segments = np.repeat((1, 2, 3, 0), (*lengths, 5)).astype(np.int32)[None]
    positions = np.concatenate([np.arange(length) for length in (*lengths, 5)]).astype(np.int32)[None]
    heads = (decoder.num_heads, decoder.num_kv_heads, decoder.num_kv_heads, decoder.num_heads)
    q, k, v, cotangent = (
        jnp.asarray(rng.normal(size=(1, num_tokens, n, decoder.head_dim)), config.compute_dtype) for n in heads
    )
    cotangent = jnp.where((segments > 0)[..., None, None], cotangent, 0)

    def value_and_gradients(name: str) -> list[np.ndarray]:
        def attended(q, k, v):
            return jnp.where(
                (segments > 0)[..., None, None], attention(q, k, v, packed_mask(segments, positions, name), name), 0
            )

        @jax.jit
        def run(q, k, v, cotangent):
            value, pull_back = jax.vjp(attended, q, k, v)
            return value, *pull_back(cotangent)

        return [np.asarray(x, np.float32) for x in run(q, k, v, cotangent)]

    try:
        found = value_and_gradients(implementation)
    except Exception as error:  # a compiler's own, of any kind
        return f"it does not run here ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    for name, ours, theirs in zip(("output", "dq", "dk", "dv"), found, value_and_gradients("xla"), strict=True):
        error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        if not error < CHECK_TOLERANCE:
            return f"{name} differs from the reference by {error:.3g} of its largest value"
    return None
