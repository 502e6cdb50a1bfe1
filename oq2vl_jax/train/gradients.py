"""Loss and gradients of a global batch on a mesh of devices.

The loss of a step is the sum of cross entropies over all labelled tokens of the global batch divided by their number,
whatever the split into devices and microbatches (the published code averages the means of microbatches).

Each device runs its own rows, one microbatch at a time. The token tables are 15 % of the trained parameters, with
float32 gradients of 0.93 GB. Only the two ends of the model read them, so their gradients accumulate in place, in one
array over all microbatches:

    embeddings = table[tokens] -> model -> hidden -> logits of a chunk -> loss
    gradient[tokens] += back   <- model <- back   <- gradient += chunk's part
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from oq2vl_jax import own_code
from oq2vl_jax.config import LossConfig, TrainConfig
from oq2vl_jax.data.loading.batch import IGNORE, Batch
from oq2vl_jax.errors import UserError
from oq2vl_jax.model.layers import Compute, stacked
from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
from oq2vl_jax.model.qwen2 import fused, unfused
from oq2vl_jax.model.scopes import Scope
from oq2vl_jax.sharding import (
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
from oq2vl_jax.train.attention_choice import compute_of
from oq2vl_jax.train.cross_entropy import cross_entropy_and_gradients, cross_entropy_sum
from oq2vl_jax.train.loss import Loss
from oq2vl_jax.train.loss import loss as default_loss
from oq2vl_jax.train.parts import split_trainable, split_vocabulary
from oq2vl_jax.trees import is_matrix, merge_parts

MAX_CHUNK, MIN_CHUNK, CHUNK_SHARE = 512, 32, 1 / 8
"""Positions whose logits exist at once on a device: CHUNK_SHARE of the microbatch, within bounds.
A chunk costs a pass over the head's float32 gradient; unused positions cost matrix products."""


def loss_and_gradients(
    model: OpenQwen2VL,
    batch: Batch,
    config: TrainConfig,
    mesh: Mesh,
    compute: Compute | None = None,
    inputs: jax.tree_util.Partial | None = None,
) -> tuple[Float[Array, ""], Any]:
    """Returns the loss per labelled token of a global batch, and the trained parts' gradients, sharded like their
    masters. The gradients of a loss of the researcher's own (config.loss.own) are plain.
    inputs: such a loss with arrays of its own, from own_loss_inputs; its arrays are replicated on every device.

    compute: from attention_choice.checked_compute; None takes compute_of. sharding.py describes the collectives.
    """
    compute = compute or compute_of(config, mesh)
    trained, frozen = split_trainable(compute_copy(model, config), config)
    dims, shardings = gathered_dims(trained, mesh), parameter_shardings(trained, mesh)
    frozen_dims, frozen_shardings = gathered_dims(frozen, mesh), parameter_shardings(frozen, mesh)
    scale = 1 / jnp.maximum((batch.labels != IGNORE).sum(), 1).astype(jnp.float32)

    def on_device(trained, frozen, batch, scale, inputs):
        dims_now, frozen_now, of_device = gathered_at_once(dims, frozen_dims, config, compute)
        trained, frozen = gather(trained, dims_now), gather(frozen, frozen_now)
        if config.execution.layers == "one_by_one":
            trained, frozen = with_layers_unstacked(trained), with_layers_unstacked(frozen)
        microbatches = split_microbatches(batch, rows_per_device(config, mesh))
        gradients_of = microbatch_gradients_of(config, inputs)
        value, gradients = sum_of_microbatches(trained, frozen, microbatches, scale, of_device, gradients_of)
        if config.execution.layers == "one_by_one":
            gradients.decoder.layers = nnx.data(stacked(gradients.decoder.layers))
        return jax.lax.psum(value, ROW_AXES), reduce_gradients(gradients, dims, dims_now, mesh)

    whole, rows = replicated(mesh).spec, row_sharding(mesh).spec
    value, gradients = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(specs(shardings), specs(frozen_shardings), rows, whole, whole),
        out_specs=(whole, specs(shardings)),
        check_vma=False,  # devices may differ in a loop's length; such loops hold no collective
    )(trained, frozen, batch, scale, inputs)
    if is_fused(config):
        gradients.decoder.layers = unfused(gradients.decoder.layers)
    return value, gradients


def sum_of_microbatches(
    trained: Any,
    frozen: Any,
    microbatches: Batch,
    scale: jax.Array,
    compute: Compute,
    gradients_of: "MicrobatchGradients",
) -> tuple[jax.Array, Any]:
    """Returns scale * loss of one device's rows and its float32 gradients. microbatches: a Batch of [N, rows, ...]."""
    tables, other_gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), split_vocabulary(trained))
    if len(microbatches.tokens) == 1:  # nothing to add up
        only = jax.tree.map(lambda x: x[0], microbatches)
        value, other_gradients, tables = gradients_of(trained, frozen, only, scale, tables, compute)
        return value, merge_parts(tables, jax.tree.map(lambda x: x.astype(jnp.float32), other_gradients))

    def add(carry, microbatch):
        value, other_gradients, tables = carry
        of_one, delta, tables = gradients_of(trained, frozen, microbatch, scale, tables, compute)
        return (value + of_one, jax.tree.map(jnp.add, other_gradients, delta), tables), None

    (value, other_gradients, tables), _ = jax.lax.scan(add, (jnp.float32(0), other_gradients, tables), microbatches)
    return value, merge_parts(tables, other_gradients)


def own_loss_inputs(config: TrainConfig) -> jax.tree_util.Partial | None:
    """Returns the researcher's own loss if it has arrays of its own, such as a teacher's weights. They have to be
    arguments of the compiled step. Raises UserError with several processes."""
    own = own_code.load(config.loss.own) if config.loss.own is not None else None
    if not isinstance(own, jax.tree_util.Partial):
        return None
    if jax.process_count() > 1:
        raise UserError("loss.own: a loss with arrays of its own runs in one process only.")
    return own


def microbatch_gradients_of(config: TrainConfig, inputs: jax.tree_util.Partial | None) -> "MicrobatchGradients":
    if config.loss.own is not None:
        return partial(plain_gradients, inputs or own_code.load(config.loss.own))
    if config.gradients == "plain":
        return partial(plain_gradients, partial(default_loss, terms=config.loss))
    return partial(fused_gradients, config.loss)


def fused_gradients(
    terms: LossConfig,
    trained: Any,
    frozen: Any,
    batch: Batch,
    scale: jax.Array,
    table_gradients: Any,
    compute: Compute,
) -> tuple[jax.Array, Any, Any]:
    """Returns the scaled loss, the gradients of everything trained except the token tables, and table_gradients with
    this microbatch added."""
    tables, others = split_vocabulary(trained)

    def hidden_states(others, embeddings):
        model = merge_parts(merge_parts(tables, others), frozen)
        x = model.with_images(embeddings, batch.tokens, batch.images, compute)
        return model.decoder(x, batch.segment_ids, batch.positions, compute)

    decoder = merge_parts(trained, frozen).decoder
    is_trained = bool(jax.tree.leaves(table_gradients))
    hidden, pull_back = jax.vjp(hidden_states, others, decoder.embed(batch.tokens, compute.dtype))
    with jax.named_scope(Scope.LOSS):
        value, hidden_gradient, head_gradient = cross_entropy_and_gradients(
            hidden,
            decoder.head,
            batch.labels,
            scale,
            table_gradients.decoder.head if is_trained else None,
            chunk_size(batch.labels.size),
            terms,
        )
    other_gradients, embedding_gradient = pull_back(hidden_gradient)
    if is_trained:
        table_gradients = jax.tree.map(lambda x: x, table_gradients)
        sums = table_gradients.decoder
        sums.set_head(head_gradient)
        sums.embed_tokens[...] = sums.embed_tokens[...].at[batch.tokens].add(embedding_gradient.astype(jnp.float32))
    return value, other_gradients, table_gradients


def plain_gradients(
    loss: Loss, trained: Any, frozen: Any, batch: Batch, scale: jax.Array, table_gradients: Any, compute: Compute
) -> tuple[jax.Array, Any, Any]:
    """Returns what fused_gradients does, of any loss, by jax.grad; all logits exist at once."""

    def scaled_loss(trained):
        result = loss(merge_parts(trained, frozen), batch, compute)
        if not isinstance(result, tuple) or len(result) != 2:
            raise UserError("the loss returns no pair (sum over labelled tokens, number of labelled tokens).")
        return scale * result[0]

    value, gradients = jax.value_and_grad(scaled_loss)(trained)
    tables, other_gradients = split_vocabulary(gradients)
    return (
        value,
        other_gradients,
        jax.tree.map(lambda total, delta: total + delta.astype(jnp.float32), table_gradients, tables),
    )


MicrobatchGradients = Callable[[Any, Any, Batch, jax.Array, Any, Compute], tuple[jax.Array, Any, Any]]
"""fused_gradients of some terms, or plain_gradients of a loss."""


def loss_sum(model: OpenQwen2VL, batch: Batch, compute: Compute = Compute()) -> jax.Array:
    """Returns the float32 sum of cross entropies over the labelled tokens of a batch."""
    hidden = model(batch.tokens, batch.images, batch.segment_ids, batch.positions, compute)
    with jax.named_scope(Scope.LOSS):
        return cross_entropy_sum(hidden, model.decoder.head, batch.labels, chunk_size(batch.labels.size))


def total_loss(
    model: OpenQwen2VL, batch: Batch, config: TrainConfig, mesh: Mesh, compute: Compute | None = None
) -> Float[Array, ""]:
    """Returns the sum of cross entropies of a global batch, without gradients. compute: see loss_and_gradients."""
    compute = compute or compute_of(config, mesh)
    copy = compute_copy(model, config)
    dims, shardings = gathered_dims(copy, mesh), parameter_shardings(copy, mesh)

    def on_device(copy, batch):
        dims_now, _, of_device = gathered_at_once(dims, None, config, compute)
        whole = gather(copy, dims_now)
        microbatches = split_microbatches(batch, rows_per_device(config, mesh))
        losses = jax.lax.map(lambda microbatch: loss_sum(whole, microbatch, of_device), microbatches)
        return jax.lax.psum(losses.sum(), ROW_AXES)

    whole, rows = replicated(mesh).spec, row_sharding(mesh).spec
    in_specs = (specs(shardings), rows)
    return jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=whole, check_vma=False)(copy, batch)


def compute_copy(model: OpenQwen2VL, config: TrainConfig) -> OpenQwen2VL:
    """Copies the weights for one step, each device its shard: matrices in config.compute_dtype, the decoder's fused.

    Vectors and token tables stay float32: a token's embedding gradient sums over all its positions, and bfloat16 would
    round small terms away.
    """

    def cast(node):
        is_wide = not isinstance(node, nnx.Param) or not is_matrix(node) or "vocab" in node.axes
        return node if is_wide else node.replace(node.get_value().astype(config.compute_dtype))

    copy = jax.tree.map(cast, model, is_leaf=lambda node: isinstance(node, nnx.Param))
    if is_fused(config):
        copy.decoder.layers = fused(copy.decoder.layers, config.execution.gate_up == "fused")
    return copy


def is_fused(config: TrainConfig) -> bool:
    """Adapters belong to q, k, v, gate and up one by one; and a frozen base is not copied, which saves its memory."""
    return config.lora.rank is None


def with_layers_unstacked(model: OpenQwen2VL) -> OpenQwen2VL:
    """Returns the model, or a part of it, with the decoder's layers unstacked (model.layers.run_layers says why)."""
    model = jax.tree.map(lambda x: x, model)
    model.decoder.layers = nnx.data(model.decoder.unstacked_layers())
    return model


def gathered_at_once(dims: Any, frozen_dims: Any, config: TrainConfig, compute: Compute) -> tuple[Any, Any, Compute]:
    """Returns the dims to gather before the first microbatch, of trained and of frozen parameters (others are WHOLE),
    and `compute` to gather the others. frozen_dims: None if nothing is frozen.

    With FSDP each decoder layer is gathered just before it runs, the frozen base of its adapters too. A decoder that is
    not trained at all is gathered at once.
    """
    if config.mesh.sharding == "zero1" or not jax.tree.leaves(dims.decoder):
        return dims, frozen_dims, compute
    layers = dims.decoder.layers
    if frozen_dims is not None:
        layers = merge_parts(layers, frozen_dims.decoder.layers)
    now, frozen_now = (with_whole_layers(tree) for tree in (dims, frozen_dims))
    return now, frozen_now, compute._replace(gather=layer_gather(layers))


def with_whole_layers(dims: Any) -> Any:
    if dims is None:
        return None
    dims = jax.tree.map(lambda x: x, dims)
    dims.decoder.layers = jax.tree.map(lambda _: WHOLE, dims.decoder.layers)
    return dims


def rows_per_device(config: TrainConfig, mesh: Mesh) -> int:
    """Returns the rows of a microbatch on one device."""
    return config.rows_per_device or config.global_batch_size // mesh.size


def split_microbatches(batch: Batch, rows: int) -> Batch:
    """Reshapes one device's rows from [B, ...] to [B / rows, rows, ...]."""
    return jax.tree.map(lambda x: x.reshape(len(x) // rows, rows, *x.shape[1:]), batch)


def chunk_size(num_positions: int) -> int:
    """Returns the number of positions of a microbatch whose logits exist at once."""
    return min(MAX_CHUNK, max(MIN_CHUNK, int(CHUNK_SHARE * num_positions)))
