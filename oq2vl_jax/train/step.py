"""TrainState and the train step: pure functions, no I/O. Loss and gradients: train/gradients.py."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from oq2vl_jax.config import TrainConfig
from oq2vl_jax.data.loading.batch import Batch
from oq2vl_jax.errors import UserError
from oq2vl_jax.model.adapters import with_adapters
from oq2vl_jax.model.layers import Compute
from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
from oq2vl_jax.model.scopes import Scope
from oq2vl_jax.sharding import parameter_shardings, replicated, row_sharding
from oq2vl_jax.train.gradients import loss_and_gradients, own_loss_inputs
from oq2vl_jax.train.optimizer import make_optimizer
from oq2vl_jax.train.parts import split_trainable
from oq2vl_jax.train.schedule import at_learning_rates, make_schedule
from oq2vl_jax.train.spikes import SpikeWindow, check_spike, empty_window
from oq2vl_jax.trees import merge_parts, named_arrays, path_name

MAX_REPLICATED = 2**20
"""Most elements of an optimizer array that may be replicated."""


class TrainState(NamedTuple):
    """step: int32 scalar, steps done; model: float32 masters (the base of adapters: in config.compute_dtype);
    opt_state: of the trained parts only. ema: the averaged trained parts, None without config.ema.decay. spikes: None
    without config.skip_spikes."""

    step: jax.Array
    model: OpenQwen2VL
    opt_state: Any
    ema: Any = None
    spikes: SpikeWindow | None = None


class StepMetrics(NamedTuple):
    """Scalars of one step. loss is per labelled token, in nats if it is the cross entropy; grad_norm is taken before
    clipping. skipped_steps: of the run so far, None without config.skip_spikes."""

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    skipped_steps: jax.Array | None = None


def init_train_state(key: jax.Array, config: TrainConfig) -> TrainState:
    model = OpenQwen2VL(key, config.model)
    if config.lora.rank is not None:
        model = with_adapters(model, config.lora, key, base_dtype=config.compute_dtype)
    trained, _ = split_trainable(model, config)
    opt_state = make_optimizer(config.optimizer).init(trained)
    ema = jax.tree.map(jnp.copy, trained) if config.ema.decay is not None else None
    return TrainState(jnp.int32(0), model, opt_state, ema, empty_window() if config.skip_spikes else None)


def state_shardings(config: TrainConfig, mesh: Mesh) -> Any:
    """Returns a TrainState with a sharding for every array; optimizer moments are sharded like their parameter."""
    state = jax.eval_shape(lambda: init_train_state(jax.random.key(0), config))
    model_shardings = parameter_shardings(state.model, mesh)
    return TrainState(
        replicated(mesh),
        model_shardings,
        moment_shardings(state.opt_state, state.model, model_shardings, mesh),
        parameter_shardings(state.ema, mesh),
        jax.tree.map(lambda _: replicated(mesh), state.spikes),
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
    inputs: jax.tree_util.Partial | None = None,
) -> tuple[TrainState, StepMetrics]:
    """Takes one step on a global batch. compute, inputs: see gradients.loss_and_gradients."""
    trained, frozen = split_trainable(state.model, config)
    value, gradients = loss_and_gradients(state.model, batch, config, mesh, compute, inputs)
    norm = optax.tree.norm(gradients)
    with jax.named_scope(Scope.OPTIMIZER):
        updates, opt_state = make_optimizer(config.optimizer).update(gradients, state.opt_state, trained)
        updates = at_learning_rates(updates, config, state.step)
        stepped = optax.apply_updates(trained, updates)
        ema = None if config.ema.decay is None else averaged(state.ema, stepped, config.ema.decay, state.step)
        spikes, old, new = state.spikes, (trained, state.opt_state, state.ema), (stepped, opt_state, ema)
        if spikes is not None:
            is_spike, spikes = check_spike(spikes, value, norm)
            new = jax.tree.map(lambda before, after: jnp.where(is_spike, before, after), old, new)
    stepped, opt_state, ema = new
    learning_rate = jnp.float32(make_schedule(config)(state.step))
    metrics = StepMetrics(value, norm, learning_rate, spikes.num_skipped if spikes is not None else None)
    return TrainState(state.step + 1, merge_parts(stepped, frozen), opt_state, ema, spikes), metrics


def averaged(average: Any, parameters: Any, decay: float, step: jax.Array) -> Any:
    """Returns the moving average with the parameters of a step (from 0) added."""
    kept = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: old + (1 - kept) * (new - old), average, parameters)


def averaged_model(state: TrainState, config: TrainConfig) -> Any:
    """Returns the model with the averaged weights of its trained parts."""
    return merge_parts(state.ema, split_trainable(state.model, config)[1])


def compile_train_step(config: TrainConfig, mesh: Mesh, compute: Compute | None = None):
    """Jits train_step, with the state donated and the shardings of inputs and outputs explicit."""
    shardings, inputs = state_shardings(config, mesh), own_loss_inputs(config)
    placed = () if inputs is None else (jax.device_put(inputs, replicated(mesh)),)
    step = jax.jit(
        lambda state, batch, *inputs: train_step(state, batch, config, mesh, compute, *inputs),
        in_shardings=(shardings, row_sharding(mesh), *(replicated(mesh) for _ in placed)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
    return step if inputs is None else lambda state, batch: step(state, batch, *placed)


def shapes_with(config: TrainConfig, shardings: Any) -> TrainState:
    """Returns the train state as shapes with shardings, into which Orbax restores."""
    shapes = jax.eval_shape(lambda: init_train_state(jax.random.key(0), config))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
