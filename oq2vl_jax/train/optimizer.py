"""AdamW, its learning rate schedule, the weight decay mask and the learning rates by part.

Frozen parts have no gradient and no optimizer state: `split_trainable` splits the model before differentiation, and
the optimizer sees the trained part only.
"""

from typing import Any

import jax
import optax
from flax import nnx

from oq2vl_jax.config import OptimizerConfig
from oq2vl_jax.trees import is_matrix


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Rises linearly from 0 over warmup_fraction of the steps, then falls as a cosine to 0, as in Hugging Face."""
    warmup_steps = int(config.warmup_fraction * num_steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(num_steps, warmup_steps + 1),
        end_value=0.0,
    )


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Chains clipping by global norm, AdamW with the schedule and decay of matrices only, and the rates by part."""
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
    """Returns each part's learning rate divided by the common one, for parts that have their own."""
    learning_rates = {
        "vision": config.vision_learning_rate,
        "projector": config.projector_learning_rate,
        "decoder": config.decoder_learning_rate,
    }
    return {part: rate / config.learning_rate for part, rate in learning_rates.items() if rate is not None}


def scale_parts(factors: dict[str, float]) -> optax.GradientTransformation:
    """Scales AdamW's update of a part; the update, decay included, is proportional to the learning rate."""

    def scale(updates: Any, params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, x: x * factors.get(path[0].name, 1.0), updates)

    return optax.stateless(scale)


def decay_mask(parameters: Any) -> Any:
    """Returns True for matrices; False for biases and norm scales, which also have two axes if stacked."""

    def mark(node):
        if not isinstance(node, nnx.Param) or node.get_value() is None:  # None: a part that split_trainable left out
            return node
        return node.replace(is_matrix(node))

    return jax.tree.map(mark, parameters, is_leaf=lambda node: isinstance(node, nnx.Param))
