"""TrainState, the loss and the train step: pure functions, no I/O.

The loss of a step is the sum of cross entropies over all labelled tokens of the global batch divided by their number,
whatever the split into devices and microbatches (the published code averages the means of microbatches).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from oq2vl_jax.config import TrainConfig
from oq2vl_jax.data.batch import IGNORE, Batch
from oq2vl_jax.model.layers import Compute
from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
from oq2vl_jax.model.qwen2 import fused, unfused
from oq2vl_jax.train.attention_choice import choose_attention
from oq2vl_jax.train.cross_entropy import cross_entropy_sum
from oq2vl_jax.train.optimizer import is_matrix, make_optimizer, make_schedule, merge_parts, split_trainable
from oq2vl_jax.train.sharding import (
    ROW_AXES,
    WHOLE,
    gather,
    gathered_dims,
    layer_gather,
    parameter_shardings,
    reduce_gradients,
    replicated,
    row_sharding,
    specs,
)

MAX_CHUNK, MIN_CHUNK, CHUNK_SHARE = 512, 32, 1 / 8
"""Positions whose logits exist at once on a device: a share of the microbatch, about as much as carries a label, within
bounds. A chunk costs a pass over the head's float32 gradient, the unused rest of the last one its matrix products."""


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


def loss_sum(model: OpenQwen2VL, batch: Batch, compute: Compute = Compute()) -> jax.Array:
    """Sum of cross entropies over the labelled tokens of a batch, float32."""
    hidden = model(batch.tokens, batch.images, batch.segment_ids, batch.positions, compute)
    chunk_size = min(MAX_CHUNK, max(MIN_CHUNK, int(CHUNK_SHARE * batch.labels.size)))
    with jax.named_scope("loss"):
        return cross_entropy_sum(hidden, model.decoder.head, batch.labels, chunk_size)


def compute_copy(model: OpenQwen2VL, dtype: DTypeLike) -> OpenQwen2VL:
    """The weights as a step reads them: matrices in `dtype`, the decoder's fused. Made once a step, share by share.

    Vectors stay float32, and the embedding: its gradient adds up over all positions of a token, which bfloat16 would
    round away.
    """

    def cast(node):
        is_wide = not isinstance(node, nnx.Param) or not is_matrix(node) or "vocab" in node.axes
        return node if is_wide else node.replace(node.get_value().astype(dtype))

    copy = jax.tree.map(cast, model, is_leaf=lambda node: isinstance(node, nnx.Param))
    copy.decoder.layers = fused(copy.decoder.layers)
    return copy


def loss_and_gradients(model: OpenQwen2VL, batch: Batch, config: TrainConfig, mesh: Mesh) -> tuple[jax.Array, Any]:
    """Nats per labelled token of a global batch, and the gradients of the trained parts where their masters lie.

    Every device runs its own rows, rows_per_device at a time; see train/sharding.py for what passes between them.
    """
    copy = compute_copy(model, config.compute_dtype)
    trained, frozen = split_trainable(copy, config.trainable)
    dims, shardings = gathered_dims(trained, mesh), parameter_shardings(trained, mesh)
    frozen_dims, is_fsdp = gathered_dims(frozen, mesh), config.mesh.sharding == "fsdp"
    compute = compute_of(config, mesh)
    num_labelled = jnp.maximum((batch.labels != IGNORE).sum(), 1).astype(jnp.float32)

    def on_device(trained, frozen, batch, num_labelled):
        frozen = gather(frozen, frozen_dims)
        trained = trained if is_fsdp else gather(trained, dims)

        def loss_fn(trained, microbatch):
            whole, how = whole_but_layers(trained, dims, compute) if is_fsdp else (trained, compute)
            return loss_sum(merge_parts(whole, frozen), microbatch, how) / num_labelled

        loss_and_gradient = jax.value_and_grad(loss_fn)

        def accumulate(carry, microbatch):
            return jax.tree.map(jnp.add, carry, loss_and_gradient(trained, microbatch)), None

        microbatches = split_microbatches(batch, rows_per_device(config, mesh))
        if len(microbatches.tokens) == 1:  # nothing to add up
            loss, gradients = loss_and_gradient(trained, batch)
            gradients = jax.tree.map(lambda x: x.astype(jnp.float32), gradients)
        else:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (jnp.float32(0), trained))
            (loss, gradients), _ = jax.lax.scan(accumulate, zeros, microbatches)
        return jax.lax.psum(loss, ROW_AXES), reduce_gradients(gradients, dims, is_fsdp, mesh)

    whole, rows = replicated(mesh).spec, row_sharding(mesh).spec
    loss, gradients = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(specs(shardings), specs(parameter_shardings(frozen, mesh)), rows, whole),
        out_specs=(whole, specs(shardings)),
        check_vma=False,  # loops of devices may differ in length; every collective stands outside of them
    )(trained, frozen, batch, num_labelled)
    gradients.decoder.layers = unfused(gradients.decoder.layers)
    return loss, gradients


def total_loss(model: OpenQwen2VL, batch: Batch, config: TrainConfig, mesh: Mesh) -> jax.Array:
    """Sum of cross entropies over the labelled tokens of a global batch, without gradients."""
    copy = compute_copy(model, config.compute_dtype)
    dims = gathered_dims(copy, mesh)

    def on_device(copy, batch):
        whole, compute = whole_but_layers(copy, dims, compute_of(config, mesh))
        microbatches = split_microbatches(batch, rows_per_device(config, mesh))
        losses = jax.lax.map(lambda microbatch: loss_sum(whole, microbatch, compute), microbatches)
        return jax.lax.psum(losses.sum(), ROW_AXES)

    whole, rows = replicated(mesh).spec, row_sharding(mesh).spec
    in_specs = (specs(parameter_shardings(copy, mesh)), rows)
    return jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=whole, check_vma=False)(copy, batch)


def whole_but_layers(model: OpenQwen2VL, dims: Any, compute: Compute) -> tuple[OpenQwen2VL, Compute]:
    """Inside shard_map: all but the decoder's layers gathered now, and how a layer is gathered when its turn comes.

    model: shares of the parameters, or of some parts of them (split_trainable).
    """
    if not jax.tree.leaves(model.decoder):
        return gather(model, dims), compute
    now = jax.tree.map(lambda x: x, dims)
    now.decoder.layers = jax.tree.map(lambda _: WHOLE, dims.decoder.layers)
    return gather(model, now), compute._replace(gather=layer_gather(dims.decoder.layers))


def compute_of(config: TrainConfig, mesh: Mesh) -> Compute:
    """How the devices of a mesh compute a configuration."""
    return Compute(jnp.dtype(config.compute_dtype), config.remat, choose_attention(config, mesh).name)


def rows_per_device(config: TrainConfig, mesh: Mesh) -> int:
    """Rows that one device runs at a time."""
    return config.rows_per_device or config.global_batch_size // mesh.size


def split_microbatches(batch: Batch, rows: int) -> Batch:
    """[B, ...] to [B / rows, rows, ...], the rows of one device."""
    return jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), batch)


def train_step(state: TrainState, batch: Batch, config: TrainConfig, mesh: Mesh) -> tuple[TrainState, StepMetrics]:
    """One optimizer step on a global batch."""
    trained, frozen = split_trainable(state.model, config.trainable)
    loss, gradients = loss_and_gradients(state.model, batch, config, mesh)
    with jax.named_scope("optimizer"):
        optimizer = make_optimizer(config.optimizer, config.num_steps)
        updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        model = merge_parts(optax.apply_updates(trained, updates), frozen)
    metrics = StepMetrics(
        loss, optax.tree.norm(gradients), jnp.float32(make_schedule(config.optimizer, config.num_steps)(state.step))
    )
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
