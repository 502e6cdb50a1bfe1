"""The parts of a model that training treats in their own way: what is trained, and the token tables."""

from typing import Any

from oq2vl_jax.config import TrainableConfig
from oq2vl_jax.trees import split_parts


def split_trainable(model: Any, trainable: TrainableConfig) -> tuple[Any, Any]:
    """(trained, frozen): the model twice, each with None where the other has the parameter."""
    return split_parts(model, lambda path: path[0].name in trainable.parts)


def split_vocabulary(model: Any) -> tuple[Any, Any]:
    """(the decoder's tables with a row per token, everything else), as split_trainable does."""
    return split_parts(model, lambda path: path[1].name in ("embed_tokens", "lm_head"))
