"""TrainState and the train step: pure functions, no I/O. Loss and gradients: train/gradients.py."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from oq2vl_jax.config import TrainConfig
from oq2vl_jax.data.loading.batch import Batch
from oq2vl_jax.errors import UserError
from oq2vl_jax.model.layers import Compute
from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
from oq2vl_jax.model.scopes import Scope
from oq2vl_jax.sharding import parameter_shardings, replicated, row_sharding
from oq2vl_jax.train.gradients import loss_and_gradients
from oq2vl_jax.train.loss import Loss
from oq2vl_jax.train.optimizer import make_optimizer, make_schedule
from oq2vl_jax.train.parts import split_trainable
from oq2vl_jax.trees import merge_parts, named_arrays, path_name

MAX_REPLICATED = 2**20
"""Most elements of an optimizer array that may be replicated."""


class TrainState(NamedTuple):
    """step: int32 scalar, optimizer steps done; model: float32 masters; opt_state: of the trainable parts only."""

    step: jax.Array
    model: OpenQwen2VL
    opt_state: Any


class StepMetrics(NamedTuple):
    """Float32 scalars of one step. loss is per labelled token, in nats if it is the cross entropy; grad_norm is taken
    before clipping."""

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array


def init_train_state(key: jax.Array, config: TrainConfig) -> TrainState:
    model = OpenQwen2VL(key, config.model)
    trained, _ = split_trainable(model, config.trainable)
    opt_state = make_optimizer(config.optimizer, config.num_steps).init(trained)
    return TrainState(jnp.zeros((), jnp.int32), model, opt_state)


def state_shardings(config: TrainConfig, mesh: Mesh) -> Any:
    """Returns a TrainState with a sharding for every array; optimizer moments are sharded like their parameter."""
    state = jax.eval_shape(lambda: init_train_state(jax.random.key(0), config))
    model_shardings = parameter_shardings(state.model, mesh)
    return TrainState(
        replicated(mesh), model_shardings, moment_shardings(state.opt_state, state.model, model_shardings, mesh)
    )


def moment_shardings(opt_state: Any, model: OpenQwen2VL, model_shardings: Any, mesh: Mesh) -> Any:
    """Returns the shardings of the optimizer state. An array whose path ends in a parameter's name, and which has its
    shape, is sharded like it. Others are replicated; raises UserError for one of more than MAX_REPLICATED elements.
    """
    parameters, shardings = named_arrays(model), named_arrays(model_shardings)

    def sharding_of(path, array):
        parts = path_name(path).split(".")
        suffixes = (".".join(parts[i:]) for i in range(len(parts)))
        name = next((suffix for suffix in suffixes if suffix in parameters), None)
        if name is not None and parameters[name].shape == array.shape:
            return shardings[name]
        if array.size > MAX_REPLICATED:
            raise UserError(
                f"the optimizer's state {path_name(path)} of shape {array.shape} is shaped like no parameter, and "
                "would lie whole on every device; give its sharding in train/step.py."
            )
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding_of, opt_state)


def train_step(
    state: TrainState,
    batch: Batch,
    config: TrainConfig,
    mesh: Mesh,
    compute: Compute | None = None,
    loss: Loss | None = None,
) -> tuple[TrainState, StepMetrics]:
    """Takes one optimizer step on a global batch. compute, loss: see gradients.loss_and_gradients."""
    trained, frozen = split_trainable(state.model, config.trainable)
    value, gradients = loss_and_gradients(state.model, batch, config, mesh, compute, loss)
    with jax.named_scope(Scope.OPTIMIZER):
        optimizer = make_optimizer(config.optimizer, config.num_steps)
        updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        model = merge_parts(optax.apply_updates(trained, updates), frozen)
    metrics = StepMetrics(
        value, optax.tree.norm(gradients), jnp.float32(make_schedule(config.optimizer, config.num_steps)(state.step))
    )
    return TrainState(state.step + 1, model, opt_state), metrics


def compile_train_step(config: TrainConfig, mesh: Mesh, compute: Compute | None = None, loss: Loss | None = None):
    """Jits train_step, with the state donated and the shardings of inputs and outputs explicit."""
    shardings = state_shardings(config, mesh)
    return jax.jit(
        lambda state, batch: train_step(state, batch, config, mesh, compute, loss),
        in_shardings=(shardings, row_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def shapes_with(config: TrainConfig, shardings: Any) -> TrainState:
    """Returns the train state as shapes with shardings, into which Orbax restores."""
    shapes = jax.eval_shape(lambda: init_train_state(jax.random.key(0), config))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
