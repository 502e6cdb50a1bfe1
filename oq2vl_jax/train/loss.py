"""The loss in eight lines, every logit at once: what train/gradients.py computes faster, and is compared with."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oq2vl_jax.data.loading.batch import IGNORE, Batch
from oq2vl_jax.model.layers import Compute
from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL


def loss(model: OpenQwen2VL, batch: Batch, compute: Compute = Compute()) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """(sum of nats, number of labelled tokens) of a batch; float32 logits [B, T, V] exist whole.

    Differentiable by jax.grad with respect to the model. labels == IGNORE do not count.
    """
    hidden = model(batch.tokens, batch.images, batch.segment_ids, batch.positions, compute)
    log_probabilities = jax.nn.log_softmax(model.logits(hidden))
    is_labelled = batch.labels != IGNORE
    target = jnp.where(is_labelled, batch.labels, 0)
    picked = jnp.take_along_axis(log_probabilities, target[..., None], axis=-1)[..., 0]
    return -(picked * is_labelled).sum(), is_labelled.sum()
