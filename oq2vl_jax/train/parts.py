"""Splits a model into trained and frozen parameters, and into token tables and all others."""

from typing import Any

from oq2vl_jax.config import TrainConfig
from oq2vl_jax.model.adapters import is_adapter
from oq2vl_jax.trees import split_parts


def split_trainable(model: Any, config: TrainConfig) -> tuple[Any, Any]:
    """Returns (trained, frozen): the model twice, each with None in place of the other's parameters. With adapters,
    they alone are trained."""
    if config.lora.rank is not None:
        return split_parts(model, is_adapter)
    return split_parts(model, lambda path: path[0].name in config.trainable.parts)


def split_vocabulary(model: Any) -> tuple[Any, Any]:
    """Returns (token tables, all other parameters), in the form of split_trainable."""
    return split_parts(model, lambda path: path[1].name in ("embed_tokens", "lm_head"))
