"""The kinds of optimizers, and clipping and weight decay around them.

An optimizer here is an optax transformation of the gradients of the trained parts into updates at learning rate 1,
weight decay included. The step multiplies the updates by the learning rate (train/schedule.py). Frozen parts have no
gradient and no optimizer state: `split_trainable` splits the model before differentiation.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax import contrib

from oq2vl_jax import own_code
from oq2vl_jax.config import OptimizerConfig
from oq2vl_jax.errors import UserError
from oq2vl_jax.trees import is_matrix

ADAMW_RMS = 0.2
"""Root mean square of AdamW's updates at learning rate 1, to which Muon's are scaled (arXiv 2502.16982)."""
ADAMW_AXES = {"vocab", "patch", "position"}
"""Axes of matrices that are tables or take raw pixels: Muon leaves them to AdamW, as its authors do."""


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.adamw(
        1.0, b1=config.beta1, b2=config.beta2, eps=config.eps, weight_decay=config.weight_decay, mask=decay_mask
    )


def muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Muon for matrices, each layer of a stack by itself, and AdamW for the rest. Raises UserError if no trained
    parameter is such a matrix."""

    def labels(parameters: Any) -> Any:
        marked = each_parameter(lambda node: "muon" if is_muon_matrix(node) else "adamw", parameters)
        if "muon" not in jax.tree.leaves(marked):
            raise UserError("optimizer.kind = muon: nothing trained has a matrix for it; take adamw.")
        return marked

    def dimensions(updates: Any) -> Any:
        return each_parameter(lambda node: contrib.MuonDimensionNumbers(-2, -1), updates)

    matrices = contrib.muon(
        1.0,
        beta=config.muon_momentum,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=ADAMW_RMS,
    )
    return optax.partition({"muon": matrices, "adamw": adamw(config)}, labels)


OPTIMIZERS: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {"adamw": adamw, "muon": muon}


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Chains clipping by global norm and the optimizer of config.kind, or the researcher's own, at learning rate 1."""
    optimizer = (OPTIMIZERS[config.kind] if config.own is None else own_code.load(config.own))(config)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise UserError(
            f"optimizer.own = {config.own} returns no optax transformation, but {type(optimizer).__name__}."
        )
    return optax.chain(clip_by_global_norm(config.max_grad_norm), optimizer)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Multiplies gradients by one factor, so that their global norm is at most max_norm. optax's divides each of them
    by the norm, and a compiler then writes them all once more before the optimizer reads them."""

    def clipped(updates: Any, _: Any) -> Any:
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda update: factor * update, updates)

    return optax.stateless(clipped)


def is_muon_matrix(parameter: nnx.Param) -> bool:
    return is_matrix(parameter) and not ADAMW_AXES & set(parameter.axes)


def decay_mask(parameters: Any) -> Any:
    """Returns True for matrices; False for biases and norm scales, which also have two axes if stacked."""
    return each_parameter(is_matrix, parameters)


def each_parameter(function: Callable[[nnx.Param], Any], tree: Any) -> Any:
    """Returns the tree with function(parameter) as the value of each parameter. Those without an array stay as they
    are: frozen ones (None), and those that optax masks for another optimizer."""

    def mark(node):
        if not isinstance(node, nnx.Param) or not hasattr(node.get_value(), "shape"):
            return node
        return node.replace(function(node))

    return jax.tree.map(mark, tree, is_leaf=lambda node: isinstance(node, nnx.Param))
