"""Cross entropy on labelled positions only, in chunks, with the gradients computed in the forward pass.

Only 16-26 % of the positions of a packed row carry a label, and the logits of 4,096 positions over 151,936 entries are
2.5 GB in float32. So the labelled positions of all rows are sorted to the front, and a loop whose trip count is traced
runs over chunks of them; the gradient of a chunk is computed while its logits exist (as in arXiv 2410.10989). The
train step accumulates the head's gradient, the largest of all, in one array over chunks and microbatches.

    labels   -  -  7  3     -  9  -  -      two rows, - = IGNORE
    order    2  3  5  0  1  4  6  7         chunk size 2: two chunks run, the others are skipped
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from oq2vl_jax.config import LossConfig
from oq2vl_jax.data.loading.batch import IGNORE


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy_sum(
    hidden: Float[Array, "B T D"], head: Float[Array, "V D"], labels: Int[Array, "B T"], chunk_size: int = 256
) -> Float[Array, ""]:
    """Returns the float32 sum of -log softmax(hidden @ head.T)[label] over positions with label != IGNORE.

    chunk_size: positions whose logits exist at once. The head is cast to the dtype of `hidden`; its gradient is
    accumulated in float32.
    """
    return _run(hidden, head, labels, chunk_size)[0]


def cross_entropy_and_gradients(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    scale: Float[Array, ""],
    head_gradient: Float[Array, "V D"] | None,
    chunk_size: int = 256,
    terms: LossConfig = LossConfig(),
) -> tuple[Float[Array, ""], Float[Array, "B T D"], Float[Array, "V D"] | None]:
    """Returns scale * cross_entropy_sum, its gradient wrt hidden, and head_gradient plus the gradient wrt head.

    head_gradient: float32, or None if the head is not trained. terms: added to the sum, as in token_losses.
    """
    return _run(hidden, head, labels, chunk_size, scale, head_gradient, with_gradient=True, terms=terms)


def token_losses(
    logits: Float[Array, "*N V"], target: Int[Array, "*N"], terms: LossConfig = LossConfig()
) -> Float[Array, "*N"]:
    """Returns -log softmax(logits)[target], with label smoothing and z-loss as in `terms`, of each position."""
    log_norm = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    if terms.label_smoothing:
        picked = (1 - terms.label_smoothing) * picked + terms.label_smoothing * logits.mean(axis=-1)
    losses = log_norm - picked
    return losses + terms.z_loss * log_norm**2 if terms.z_loss else losses


def logit_gradients(
    logits: Float[Array, "N V"], target: Int[Array, "N"], terms: LossConfig = LossConfig()
) -> Float[Array, "N V"]:
    """Returns the gradient of token_losses with respect to the logits."""
    log_norm = jax.nn.logsumexp(logits, axis=-1)
    probabilities = jnp.exp(logits - log_norm[:, None])
    if terms.z_loss:
        probabilities *= 1 + 2 * terms.z_loss * log_norm[:, None]
    is_target = jnp.arange(logits.shape[-1]) == target[:, None]
    if terms.label_smoothing:
        smooth = terms.label_smoothing
        return probabilities - (1 - smooth) * is_target - smooth / logits.shape[-1]
    return probabilities - is_target


def _forward(hidden, head, labels, chunk_size):
    loss, hidden_gradient, head_gradient = cross_entropy_and_gradients(
        hidden, head, labels, jnp.float32(1), jnp.zeros(head.shape, jnp.float32), chunk_size
    )
    assert head_gradient is not None
    return loss, (hidden_gradient, head_gradient.astype(head.dtype))


def _backward(chunk_size, gradients, cotangent):
    hidden_gradient, head_gradient = gradients
    return (cotangent * hidden_gradient).astype(hidden_gradient.dtype), cotangent * head_gradient, None


cross_entropy_sum.defvjp(_forward, _backward)


def _run(
    hidden, head, labels, chunk_size, scale: ArrayLike = 1.0, head_gradient=None, with_gradient=False,
    terms: LossConfig = LossConfig(),
) -> Any:  # fmt: skip
    """Returns (scale * loss, gradient wrt hidden or None, head_gradient plus the gradient wrt head or None)."""
    flat_hidden, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    num_positions = len(flat_labels)
    chunk_size = min(chunk_size, num_positions)
    padding = -num_positions % chunk_size
    is_labelled = flat_labels != IGNORE
    order = jnp.argsort(~is_labelled, stable=True)
    sorted_hidden = jnp.pad(flat_hidden[order], ((0, padding), (0, 0)))
    sorted_labels = jnp.pad(flat_labels[order], (0, padding), constant_values=IGNORE)
    compute_head = head.astype(hidden.dtype)
    num_chunks = -(-is_labelled.sum() // chunk_size)

    def run_chunk(i, carry):
        loss, sorted_gradient, head_gradient = carry
        x = jax.lax.dynamic_slice_in_dim(sorted_hidden, i * chunk_size, chunk_size)
        chunk_labels = jax.lax.dynamic_slice_in_dim(sorted_labels, i * chunk_size, chunk_size)
        logits = jnp.einsum("CD,VD->CV", x, compute_head, preferred_element_type=jnp.float32)
        weight = jnp.where(chunk_labels != IGNORE, scale, 0.0)
        target = jnp.where(chunk_labels != IGNORE, chunk_labels, 0)
        loss += (weight * token_losses(logits, target, terms)).sum()
        error = (logit_gradients(logits, target, terms) * weight[:, None]).astype(hidden.dtype)
        if sorted_gradient is not None:
            part = jnp.einsum("CV,VD->CD", error, compute_head)
            sorted_gradient = jax.lax.dynamic_update_slice_in_dim(sorted_gradient, part, i * chunk_size, axis=0)
        if head_gradient is not None:
            head_gradient += jnp.einsum("CV,CD->VD", error, x, preferred_element_type=jnp.float32)
        return loss, sorted_gradient, head_gradient

    carry = (jnp.float32(0), jnp.zeros_like(sorted_hidden) if with_gradient else None, head_gradient)
    loss, sorted_gradient, head_gradient = jax.lax.fori_loop(0, num_chunks, run_chunk, carry)
    if sorted_gradient is None:
        return loss, None, head_gradient
    unsorted = jnp.zeros_like(flat_hidden).at[order].set(sorted_gradient[:num_positions])
    return loss, unsorted.reshape(hidden.shape), head_gradient
