"""AdamW, the schedule, what is decayed and what is trained.

Frozen parts take no gradient and hold no optimizer state: `split_trainable` cuts the model in two before
differentiation, and the optimizer only ever sees the trainable half.
"""

from typing import Any

import jax
import optax
from flax import nnx

from oq2vl_jax.config import OptimizerConfig
from oq2vl_jax.trees import is_matrix


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Linear from 0 over warmup_fraction of the steps, then cosine to 0 (Hugging Face's cosine schedule)."""
    warmup_steps = int(config.warmup_fraction * num_steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(num_steps, warmup_steps + 1),
        end_value=0.0,
    )


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, Adam, decoupled decay on matrices only, the schedule, learning rates by part."""
    factors = part_factors(config)
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            make_schedule(config, num_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
        *([scale_parts(factors)] if factors else []),
    )


def part_factors(config: OptimizerConfig) -> dict[str, float]:
    """Learning rate of a part over the common one, for parts that have their own."""
    own = {
        "vision": config.vision_learning_rate,
        "projector": config.projector_learning_rate,
        "decoder": config.decoder_learning_rate,
    }
    return {part: rate / config.learning_rate for part, rate in own.items() if rate is not None}


def scale_parts(factors: dict[str, float]) -> optax.GradientTransformation:
    """Multiplies AdamW's update of a part, which is proportional to the learning rate, decay included."""

    def scale(updates: Any, params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, x: x * factors.get(path[0].name, 1.0), updates)

    return optax.stateless(scale)


def decay_mask(parameters: Any) -> Any:
    """True for matrices; False for biases and norm scales, whose stacked form [layers, dim] has two axes as well."""

    def mark(node):
        if not isinstance(node, nnx.Param) or node.get_value() is None:  # None: a part that split_trainable left out
            return node
        return node.replace(is_matrix(node))

    return jax.tree.map(mark, parameters, is_leaf=lambda node: isinstance(node, nnx.Param))
