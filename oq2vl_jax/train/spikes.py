"""Tells a spike from an ordinary step: loss or gradient norm far above those of the last steps.

As in OLMo-core's SkipStepOptimizer, a spike enters the window as well, so that a lasting change of level is no spike
for long.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LENGTH, NUM_SIGMAS = 128, 6.0


class SpikeWindow(NamedTuple):
    """Loss and gradient norm of the last LENGTH steps, the number of steps seen, and of steps that were skipped."""

    losses: Float[Array, "LENGTH"]
    norms: Float[Array, "LENGTH"]
    num_seen: Int[Array, ""]
    num_skipped: Int[Array, ""]


def empty_window() -> SpikeWindow:
    return SpikeWindow(jnp.zeros(LENGTH), jnp.zeros(LENGTH), jnp.int32(0), jnp.int32(0))


def check_spike(window: SpikeWindow, loss: jax.Array, norm: jax.Array) -> tuple[Bool[Array, ""], SpikeWindow]:
    """Returns whether a step is a spike, and the window with the step. No step is one before the window is full."""
    is_high = far_above(window.losses, loss) | far_above(window.norms, norm)
    is_spike = is_high & (window.num_seen >= LENGTH)
    place = window.num_seen % LENGTH
    return is_spike, SpikeWindow(
        window.losses.at[place].set(loss),
        window.norms.at[place].set(norm),
        window.num_seen + 1,
        window.num_skipped + is_spike,
    )


def far_above(values: Float[Array, "LENGTH"], value: jax.Array) -> Bool[Array, ""]:
    return value > values.mean() + NUM_SIGMAS * values.std(ddof=1)
