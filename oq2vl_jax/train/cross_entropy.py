"""Cross entropy on labelled positions only, in chunks, with the gradients computed in the forward pass.

Only 16-26 % of the positions of a packed row carry a label, and the logits of 4,096 positions over 151,936 entries are
2.5 GB in float32. So the labelled positions of all rows are sorted to the front, and a loop whose trip count is traced
runs over chunks of them; the gradient of a chunk is formed while its logits exist (arXiv 2410.10989 has the idea).

    labels   -  -  7  3     -  9  -  -      two rows, - = IGNORE
    order    2  3  5  0  1  4  6  7         chunk size 2: two chunks run, the rest never does
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oq2vl_jax.data.batch import IGNORE


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy_sum(
    hidden: Float[Array, "B T D"], head: Float[Array, "V D"], labels: Int[Array, "B T"], chunk_size: int = 256
) -> Float[Array, ""]:
    """Sum over labelled positions of -log softmax(hidden @ head.T)[label], in float32; labels == IGNORE do not count.

    chunk_size: positions whose logits exist at once. The head is used in the type of `hidden`; its gradient is
    accumulated in float32.
    """
    return _loss_and_gradients(hidden, head, labels, chunk_size, with_gradients=False)[0]


def _forward(hidden, head, labels, chunk_size):
    loss, gradients = _loss_and_gradients(hidden, head, labels, chunk_size, with_gradients=True)
    return loss, gradients


def _backward(chunk_size, gradients, cotangent):
    hidden_gradient, head_gradient = gradients
    return (cotangent * hidden_gradient).astype(hidden_gradient.dtype), cotangent * head_gradient, None


cross_entropy_sum.defvjp(_forward, _backward)


def _loss_and_gradients(hidden, head, labels, chunk_size, with_gradients):
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
        loss, hidden_gradient, head_gradient = carry
        x = jax.lax.dynamic_slice_in_dim(sorted_hidden, i * chunk_size, chunk_size)
        chunk_labels = jax.lax.dynamic_slice_in_dim(sorted_labels, i * chunk_size, chunk_size)
        logits = jnp.einsum("CD,VD->CV", x, compute_head, preferred_element_type=jnp.float32)
        counts = chunk_labels != IGNORE
        target = jnp.where(counts, chunk_labels, 0)
        log_norm = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        loss += jnp.where(counts, log_norm - picked, 0.0).sum()
        if with_gradients:
            is_target = jnp.arange(head.shape[0]) == target[:, None]
            error = (jnp.exp(logits - log_norm[:, None]) - is_target) * counts[:, None]
            error = error.astype(hidden.dtype)
            x_gradient = jnp.einsum("CV,VD->CD", error, compute_head)
            hidden_gradient = jax.lax.dynamic_update_slice_in_dim(hidden_gradient, x_gradient, i * chunk_size, axis=0)
            head_gradient += jnp.einsum("CV,CD->VD", error, x, preferred_element_type=jnp.float32)
        return loss, hidden_gradient, head_gradient

    head_shape = head.shape if with_gradients else ()
    carry = (jnp.float32(0), jnp.zeros_like(sorted_hidden), jnp.zeros(head_shape, jnp.float32))
    loss, hidden_gradient, head_gradient = jax.lax.fori_loop(0, num_chunks, run_chunk, carry)
    unsorted = jnp.zeros_like(flat_hidden).at[order].set(hidden_gradient[:num_positions])
    return loss, (unsorted.reshape(hidden.shape), head_gradient.astype(head.dtype))
