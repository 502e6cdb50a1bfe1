"""The description that lies beside weights."""

from dataclasses import dataclass
from typing import Literal

from oq2vl_jax.config.data import Template
from oq2vl_jax.config.model import ModelConfig

Weights = Literal["model", "ema"]
"""Weights of a checkpoint: those that were trained, or their moving average (config.ema)."""


@dataclass(frozen=True)
class CheckpointDescription:
    """Description of weights that is needed to run or export them, whatever their origin."""

    model: ModelConfig
    template: Template
    origin: str
    """"trained", or the source of the conversion."""
