"""The loss in its plain form, with all logits at once; tests compare the faster train/gradients.py with it."""

from collections.abc import Callable

from jaxtyping import Array, Float, Int

from oq2vl_jax.config import LossConfig
from oq2vl_jax.data.loading.batch import IGNORE, Batch
from oq2vl_jax.model.layers import Compute
from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
from oq2vl_jax.train.cross_entropy import token_losses

Loss = Callable[[OpenQwen2VL, Batch, Compute], tuple[Array, Array]]
"""(model, a microbatch, compute) to (sum over labelled tokens, number of labelled tokens). A step divides the sum by
the labelled tokens of the global batch, counted by itself, whatever the devices and microbatches are."""


def loss(
    model: OpenQwen2VL, batch: Batch, compute: Compute = Compute(), terms: LossConfig = LossConfig()
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Returns (sum of nats, number of labelled tokens) of a batch; all float32 logits [B, T, V] exist at once.

    Differentiable by jax.grad with respect to the model. labels == IGNORE do not count. terms: added to the sum.
    """
    hidden = model(batch.tokens, batch.images, batch.segment_ids, batch.positions, compute)
    is_labelled = batch.labels != IGNORE
    losses = token_losses(model.logits(hidden), batch.labels * is_labelled, terms)
    return (losses * is_labelled).sum(), is_labelled.sum()
