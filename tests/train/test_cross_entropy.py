from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from oq2vl_jax.config import LossConfig
from oq2vl_jax.train.cross_entropy import (
    IGNORE,
    cross_entropy_and_gradients,
    cross_entropy_sum,
    logit_gradients,
    token_losses,
)

LOSS_TOLERANCE = 2e-6  # relative; measured 1e-7
GRADIENT_TOLERANCE = 5e-6  # of the largest gradient; measured 5e-7


def whole_logits_reference(hidden, head, labels):
    """The loss and its gradients in numpy float64, every logit at once."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    logits = hidden @ head.T
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    counts = labels != IGNORE
    target = np.where(counts, labels, 0)
    picked = np.take_along_axis(log_probabilities, target[..., None], -1)[..., 0]
    error = (np.exp(log_probabilities) - np.eye(head.shape[0])[target]) * counts[..., None]
    return -(picked * counts).sum(), error @ head, np.einsum("btv,btd->vd", error, hidden)


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 16, 64])
@pytest.mark.parametrize("share_labelled", [0.0, 0.2, 1.0])
def test_loss_and_gradients_equal_the_whole_logits(chunk_size, share_labelled):
    rng = np.random.default_rng(chunk_size)
    hidden, head = rng.normal(size=(3, 16, 8)).astype(np.float32), rng.normal(size=(31, 8)).astype(np.float32)
    labels = np.where(rng.random((3, 16)) < share_labelled, rng.integers(0, 31, (3, 16)), IGNORE)
    labels[1] = IGNORE  # a row without labels
    loss, (hidden_gradient, head_gradient) = jax.value_and_grad(
        lambda hidden, head: cross_entropy_sum(hidden, head, labels, chunk_size), argnums=(0, 1)
    )(jnp.asarray(hidden), jnp.asarray(head))
    expected = whole_logits_reference(hidden, head, labels)
    assert loss == pytest.approx(expected[0], rel=LOSS_TOLERANCE, abs=1e-6)
    for ours, theirs in ((hidden_gradient, expected[1]), (head_gradient, expected[2])):
        assert np.abs(ours - theirs).max() <= GRADIENT_TOLERANCE * max(np.abs(theirs).max(), 1e-6)


def test_gradient_scales_with_the_cotangent():
    hidden, head = jnp.ones((1, 4, 2)), jnp.eye(5, 2)
    labels = jnp.array([[1, IGNORE, 2, IGNORE]])
    one = jax.grad(lambda hidden: cross_entropy_sum(hidden, head, labels))(hidden)
    third = jax.grad(lambda hidden: cross_entropy_sum(hidden, head, labels) / 3)(hidden)
    assert np.allclose(third, one / 3, rtol=1e-6)


def test_temporaries_of_a_published_row_are_chunks():
    """Compiled, not run: 4,096 x 151,936 in float32 on this CPU. On an A100 in bfloat16: tests/bench/test_plan.py."""
    hidden = jax.ShapeDtypeStruct((1, 4096, 1536), jnp.float32)
    head = jax.ShapeDtypeStruct((151_936, 1536), jnp.float32)
    labels = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    step = jax.jit(partial(cross_entropy_and_gradients, chunk_size=512), donate_argnums=4)
    temporaries = step.lower(hidden, head, labels, scale, head).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 1.25 * 2**30  # measured 1.21 (a CPU adds to the gradient after the product); whole logits 6.96


def test_terms_equal_torch_and_their_gradients_are_its():
    rng = np.random.default_rng(0)
    logits, target = 3 * rng.normal(size=(12, 31)), rng.integers(0, 31, 12)
    terms = LossConfig(z_loss=0.02, label_smoothing=0.15)
    theirs = torch.from_numpy(logits).requires_grad_()
    expected = (
        torch.nn.functional.cross_entropy(theirs, torch.from_numpy(target), reduction="none", label_smoothing=0.15)
        + 0.02 * torch.logsumexp(theirs, -1) ** 2
    )
    expected.sum().backward()
    ours = jnp.asarray(logits, jnp.float32), jnp.asarray(target)
    assert np.abs(token_losses(*ours, terms) - expected.detach().numpy()).max() < 2e-6  # measured 5e-7
    assert np.abs(logit_gradients(*ours, terms) - theirs.grad.numpy()).max() < 1e-6  # measured 1e-7
