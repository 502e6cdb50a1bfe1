"""Names of the parts of a step (jax.named_scope), by which bench/breakdown.py sorts a profile."""

from enum import StrEnum


class Scope(StrEnum):
    VISION = "vision"
    ATTENTION = "attention"
    LOSS = "loss"
    OPTIMIZER = "optimizer"
