"""AdamW against torch's own, the schedule at its corners, what is decayed and what is trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from oq2vl_jax.config import OptimizerConfig, ScheduleConfig, TrainableConfig
from oq2vl_jax.train.optimizer import clip_by_global_norm, decay_mask, make_optimizer
from oq2vl_jax.train.parts import split_trainable
from oq2vl_jax.train.schedule import SCHEDULES, at_learning_rates, make_schedule
from oq2vl_jax.trees import merge_parts, named_arrays
from tests.train.conftest import TINY, tiny_model

ADAMW_TOLERANCE = 2e-6  # absolute, on parameters of size 1 after 20 steps; measured 9.5e-7

SHAPES = {"kernel": (5, 7), "bias": (7,)}
CLIPPINGS = (clip_by_global_norm, optax.clip_by_global_norm)
CLIP_TOLERANCE = 3e-7  # relative; one rounding at most, measured 0


def scheduled(num_steps, rate=1.0, **options):
    optimizer = dataclasses.replace(TINY.optimizer, learning_rate=rate)
    return dataclasses.replace(TINY, optimizer=optimizer, schedule=ScheduleConfig(**options), num_steps=num_steps)


def test_schedule_warms_up_linearly_and_ends_at_zero():
    schedule = make_schedule(scheduled(100, warmup_fraction=0.1))
    assert [float(schedule(step)) for step in (0, 5, 10)] == pytest.approx([0.0, 0.5, 1.0])
    assert float(schedule(55)) == pytest.approx(0.5)
    assert float(schedule(100)) == pytest.approx(0.0, abs=1e-7)


def test_no_warmup_starts_at_the_full_rate():
    for kind in SCHEDULES:
        assert float(make_schedule(scheduled(100, kind=kind, warmup_fraction=0.0))(0)) == 1.0


def test_only_matrices_are_decayed():
    decayed = named_arrays(decay_mask(tiny_model()))
    assert decayed["decoder.layers.self_attn.q_proj.kernel"]
    assert decayed["decoder.embed_tokens"]
    assert not decayed["decoder.layers.self_attn.q_proj.bias"], "stacked biases have two axes and are still biases"
    assert not decayed["decoder.layers.input_layernorm.scale"]
    assert not decayed["vision.layers.layer_norm1.bias"]


def test_adamw_with_clipping_equals_torch():
    model = tiny_model()
    config = scheduled(20, 1e-2, warmup_fraction=0.0)
    config = dataclasses.replace(config, optimizer=OptimizerConfig(1e-2, weight_decay=0.1, max_grad_norm=0.5))
    optimizer = make_optimizer(config.optimizer)
    state = optimizer.init(model)
    names = named_arrays(model)
    mask = named_arrays(decay_mask(model))
    tensors = {name: torch.nn.Parameter(torch.from_numpy(np.array(value))) for name, value in names.items()}
    groups = [
        {"params": [t for n, t in tensors.items() if mask[n]], "weight_decay": 0.1},
        {"params": [t for n, t in tensors.items() if not mask[n]], "weight_decay": 0.0},
    ]
    torch_optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    rng = np.random.default_rng(0)
    schedule = make_schedule(config)
    for step in range(20):
        gradients = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in names.items()}
        ours = jax.tree_util.tree_unflatten(jax.tree.structure(model), [jnp.asarray(gradients[n]) for n in names])
        updates, state = optimizer.update(ours, state, model)
        model = optax.apply_updates(model, at_learning_rates(updates, config, jnp.int32(step)))
        for name, tensor in tensors.items():
            tensor.grad = torch.from_numpy(gradients[name])
        torch.nn.utils.clip_grad_norm_(tensors.values(), 0.5)
        for group in torch_optimizer.param_groups:
            group["lr"] = float(schedule(step))
        torch_optimizer.step()
    worst = max(np.abs(value - tensors[name].detach().numpy()).max() for name, value in named_arrays(model).items())
    print(f"AdamW: largest difference {worst:.1e}")
    assert worst < ADAMW_TOLERANCE


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e30, np.inf, np.nan])
def test_clipping_is_that_of_optax_but_for_rounding(size):
    rng = np.random.default_rng(3)
    gradients = {name: jnp.asarray(size * rng.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}
    ours, theirs = (kind(1.0).update(gradients, optax.EmptyState())[0] for kind in CLIPPINGS)
    for name in SHAPES:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=CLIP_TOLERANCE)
        if size < 0.1:
            assert np.array_equal(ours[name], gradients[name])


@pytest.mark.parametrize("parts", [("projector", "decoder"), ("vision", "projector", "decoder"), ("projector",)])
def test_frozen_parts_hold_no_optimizer_state_and_merge_back(parts):
    model = tiny_model()
    trainable = TrainableConfig(**{part: part in parts for part in ("vision", "projector", "decoder")})
    trained, frozen = split_trainable(model, dataclasses.replace(TINY, trainable=trainable))
    assert {name.split(".")[0] for name in named_arrays(trained)} == set(parts)
    state = make_optimizer(OptimizerConfig(1e-3, 0.1)).init(trained)
    num_trained = sum(x.size for x in jax.tree.leaves(trained))
    moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert moments == 2 * num_trained
    merged = named_arrays(merge_parts(trained, frozen))
    assert all(merged[name] is value for name, value in named_arrays(model).items())
