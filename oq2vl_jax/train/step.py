"""TrainState, the loss and the train step: pure functions, no I/O.

The loss of a step is the sum of cross entropies over all labelled tokens of the global batch divided by their number,
whatever the split into devices and microbatches (the published code averages the means of microbatches).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from oq2vl_jax.config import TrainConfig
from oq2vl_jax.data.batch import IGNORE, Batch
from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
from oq2vl_jax.train.cross_entropy import cross_entropy_sum
from oq2vl_jax.train.optimizer import make_optimizer, make_schedule, merge_parts, split_trainable
from oq2vl_jax.train.sharding import constrain_rows, parameter_shardings, replicated, row_sharding

CHUNK_POSITIONS, MIN_CHUNK = 512, 32
"""Labelled positions whose logits exist at once on a device, and at least so many of each row."""


class TrainState(NamedTuple):
    """step: int32 scalar, optimizer steps done; model: float32 masters; opt_state: of the trainable parts only."""

    step: jax.Array
    model: OpenQwen2VL
    opt_state: Any


class StepMetrics(NamedTuple):
    """Float32 scalars of one step. loss is nats per labelled token; grad_norm is taken before clipping."""

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array


def init_train_state(key: jax.Array, config: TrainConfig) -> TrainState:
    model = OpenQwen2VL(key, config.model)
    trained, _ = split_trainable(model, config.trainable)
    opt_state = make_optimizer(config.optimizer, config.num_steps).init(trained)
    return TrainState(jnp.zeros((), jnp.int32), model, opt_state)


def state_shardings(config: TrainConfig, mesh: Mesh) -> Any:
    """A TrainState with a sharding for every array; optimizer moments lie where their parameter lies."""
    state = jax.eval_shape(lambda: init_train_state(jax.random.key(0), config))
    trained, _ = split_trainable(state.model, config.trainable)
    trained_shardings = parameter_shardings(trained, mesh)
    structure = jax.tree.structure(trained)

    def is_like_parameters(node):
        return jax.tree.structure(node) == structure

    opt_shardings = jax.tree.map(
        lambda node: trained_shardings if is_like_parameters(node) else replicated(mesh),
        state.opt_state,
        is_leaf=is_like_parameters,
    )
    return TrainState(replicated(mesh), parameter_shardings(state.model, mesh), opt_shardings)


def loss_sum(model: OpenQwen2VL, batch: Batch, config: TrainConfig, mesh: Mesh | None = None) -> jax.Array:
    """Sum of cross entropies over the labelled tokens of a batch, float32."""
    dtype = jnp.dtype(config.compute_dtype)
    constrain = constrain_rows(mesh) if mesh is not None else lambda x: x
    hidden = model(
        batch.tokens, batch.images, batch.segment_ids, batch.positions, dtype, remat=config.remat, constrain=constrain
    )
    chunk_size = max(MIN_CHUNK, CHUNK_POSITIONS // rows_per_device(config, mesh))
    return cross_entropy_sum(hidden, model.decoder.head, batch.labels, chunk_size)


def rows_per_device(config: TrainConfig, mesh: Mesh | None) -> int:
    """Rows that one device runs at a time."""
    return config.rows_per_device or config.global_batch_size // (mesh.size if mesh is not None else 1)


def split_microbatches(batch: Batch, num_devices: int, rows_per_device: int) -> Batch:
    """[B, ...] to [num_microbatches, devices * rows_per_device, ...]; every device keeps its own rows."""

    def split(x):
        x = x.reshape(num_devices, -1, rows_per_device, *x.shape[1:])
        return x.swapaxes(0, 1).reshape(x.shape[1], num_devices * rows_per_device, *x.shape[3:])

    return jax.tree.map(split, batch)


def train_step(state: TrainState, batch: Batch, config: TrainConfig, mesh: Mesh) -> tuple[TrainState, StepMetrics]:
    """One optimizer step on a global batch."""
    trained, frozen = split_trainable(state.model, config.trainable)
    num_labelled = jnp.maximum((batch.labels != IGNORE).sum(), 1).astype(jnp.float32)

    def loss_fn(trained, microbatch):
        return loss_sum(merge_parts(trained, frozen), microbatch, config, mesh) / num_labelled

    loss_and_grad = jax.value_and_grad(loss_fn)
    rows = rows_per_device(config, mesh)
    if rows * mesh.size == config.global_batch_size:
        loss, gradients = loss_and_grad(trained, batch)
    else:

        def accumulate(carry, microbatch):
            return jax.tree.map(jnp.add, carry, loss_and_grad(trained, microbatch)), None

        microbatches = split_microbatches(batch, mesh.size, rows)
        zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
        (loss, gradients), _ = jax.lax.scan(accumulate, zeros, microbatches)
    updates, opt_state = make_optimizer(config.optimizer, config.num_steps).update(gradients, state.opt_state, trained)
    metrics = StepMetrics(
        loss, optax.tree.norm(gradients), jnp.float32(make_schedule(config.optimizer, config.num_steps)(state.step))
    )
    model = merge_parts(optax.apply_updates(trained, updates), frozen)
    return TrainState(state.step + 1, model, opt_state), metrics


def compile_train_step(config: TrainConfig, mesh: Mesh):
    """The jitted step: state donated, shardings explicit on both sides."""
    shardings = state_shardings(config, mesh)
    return jax.jit(
        lambda state, batch: train_step(state, batch, config, mesh),
        in_shardings=(shardings, row_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
