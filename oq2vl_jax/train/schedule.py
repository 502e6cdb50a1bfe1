"""The kinds of schedules: the learning rate of each part as a function of the step.

cosine    /\\            wsd   /-----\\          constant   /--------
         /  `-.__            /       \\                   /
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from oq2vl_jax import own_code
from oq2vl_jax.config import PARTS, TrainConfig

Schedule = Callable[[Any], Any]
"""Step (from 0) to learning rate."""


def cosine(peak: float, warmup_steps: int, config: TrainConfig) -> Schedule:
    """Falls as a cosine to 0, as in Hugging Face."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps else peak,
        peak_value=peak,
        warmup_steps=warmup_steps,
        decay_steps=max(config.num_steps, warmup_steps + 1),
        end_value=0.0,
    )


def constant(peak: float, warmup_steps: int, config: TrainConfig) -> Schedule:
    return optax.warmup_constant_schedule(0.0 if warmup_steps else peak, peak, max(warmup_steps, 1))


def wsd(peak: float, warmup_steps: int, config: TrainConfig) -> Schedule:
    """Warm-up, stable, and linear decay to 0 over the last decay_fraction of the steps (arXiv 2405.18392)."""
    decay_steps = max(1, round(config.schedule.decay_fraction * config.num_steps))
    stable, decay = constant(peak, warmup_steps, config), optax.linear_schedule(peak, 0.0, decay_steps)
    return optax.join_schedules([stable, decay], [config.num_steps - decay_steps])


SCHEDULES: dict[str, Callable[[float, int, TrainConfig], Schedule]] = {
    "cosine": cosine,
    "wsd": wsd,
    "constant": constant,
}


def make_schedule(config: TrainConfig, part: str | None = None) -> Schedule:
    """Returns the schedule of config.schedule with its warm-up and peak; part: with those of a part."""
    fraction = getattr(config.schedule, f"{part}_warmup_fraction") if part else None
    fraction = config.schedule.warmup_fraction if fraction is None else fraction
    own = config.schedule.own
    make = SCHEDULES[config.schedule.kind] if own is None else own_code.load(own)
    shape = make(config.optimizer.learning_rate, int(fraction * config.num_steps), config)
    rate = getattr(config.optimizer, f"{part}_learning_rate") if part else None
    return shape if rate is None else lambda step: shape(step) * (rate / config.optimizer.learning_rate)


def at_learning_rates(updates: Any, config: TrainConfig, step: jax.Array) -> Any:
    """Multiplies the updates of each part, at learning rate 1, by its learning rate at a step."""
    rates = {part: jnp.float32(make_schedule(config, part)(step)) for part in PARTS}
    return jax.tree_util.tree_map_with_path(lambda path, x: x * rates[path[0].name].astype(x.dtype), updates)
