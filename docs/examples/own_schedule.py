"""A schedule of one's own: warm-up, then the inverse square root of the step.

python -m oq2vl_jax.train tiny --run-dir runs/inverse_root --schedule.own docs/examples/own_schedule.py:inverse_root
"""

import jax.numpy as jnp


def inverse_root(peak, warmup_steps, config):
    """Returns a function of the step (a traced int32, from 0): the learning rate."""
    start = max(warmup_steps, 1)
    return lambda step: peak * jnp.minimum((step + 1) / start, (start / (step + 1)) ** 0.5)
