"""The step on meshes of devices and in microbatches: the same loss, gradients and parameters; what is sharded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oq2vl_jax.config import LoraConfig, MeshConfig, TrainableConfig
from oq2vl_jax.data.loading.batch import IGNORE, Batch
from oq2vl_jax.errors import UserError
from oq2vl_jax.sharding import make_mesh, parameter_shardings, to_global_batch
from oq2vl_jax.train import step as step_module
from oq2vl_jax.train.optimizer import decay_mask
from oq2vl_jax.train.step import compile_train_step, init_train_state, state_shardings
from oq2vl_jax.trees import named_arrays
from tests.train.conftest import TINY, tiny_model

LOSS_TOLERANCE = 2e-6  # relative, 4x2 mesh against 1x1; measured 1e-7
PARAMETER_TOLERANCE = 2e-6  # absolute after 3 Adam steps at 3e-3, 4x2 against 1x1; measured 6e-8
ACCUMULATION_TOLERANCE = 2e-6  # relative, loss and gradient norm; measured 8e-8


def random_batch(rows=8, seed=0):
    """Rows of two documents with an image each, and half of the text labelled, unevenly over the rows."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, (rows, 32)).astype(np.int32)
    tokens[:, 1:5] = tokens[:, 17:21] = 268
    segments = np.repeat([[1, 2]], 16, axis=1).repeat(rows, axis=0).astype(np.int32)
    positions = np.tile(np.arange(16), (rows, 2)).astype(np.int32)
    is_labelled = rng.random((rows, 32)) < np.linspace(0.1, 0.9, rows)[:, None]
    labels = np.where(is_labelled & (tokens != 268), rng.integers(0, 256, (rows, 32)), IGNORE).astype(np.int32)
    return Batch(tokens, labels, positions, segments, rng.integers(0, 256, (rows, 2, 32, 32, 3), dtype=np.uint8))


def one_device_mesh():
    from jax.sharding import AxisType

    return jax.make_mesh((1, 1), ("data", "fsdp"), (AxisType.Auto,) * 2, devices=jax.devices()[:1])


def train_steps(config, mesh, num_steps=3):
    """(losses, gradient norms, parameters) of a few steps on random batches."""
    shardings = state_shardings(config, mesh)
    state = jax.jit(lambda key: init_train_state(key, config), out_shardings=shardings)(jax.random.key(0))
    step = compile_train_step(config, mesh)
    losses, norms = [], []
    for i in range(num_steps):
        state, metrics = step(state, to_global_batch(random_batch(seed=i), mesh))
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))
    return np.array(losses), np.array(norms), {k: np.asarray(v) for k, v in named_arrays(state.model).items()}


QWEN3 = {
    "model": dataclasses.replace(TINY.model, decoder=dataclasses.replace(TINY.model.decoder, kind="qwen3", head_dim=24))
}
LORA = {"lora": LoraConfig(rank=4, targets=("vision", "projector", "decoder"))}


@pytest.mark.parametrize("changes", [{}, QWEN3, LORA], ids=["qwen2", "qwen3", "lora"])
def test_loss_on_a_4x2_mesh_equals_1x1(changes):
    # a large eps: with Adam's 1e-8 a gradient of 1e-9 moves a parameter by its sign, which rounding decides
    smooth = dataclasses.replace(TINY, optimizer=dataclasses.replace(TINY.optimizer, eps=1e-2), **changes)
    losses, norms, parameters = train_steps(smooth, one_device_mesh())
    for data, fsdp, sharding in ((4, 2, "zero1"), (1, 8, "fsdp")):
        config = dataclasses.replace(smooth, mesh=MeshConfig(data, fsdp, sharding))
        mesh_losses, mesh_norms, mesh_parameters = train_steps(config, make_mesh(config.mesh))
        worst = max(np.abs(mesh_parameters[name] - value).max() for name, value in parameters.items())
        print(f"{data}x{fsdp} {sharding}: loss {np.abs(mesh_losses / losses - 1).max():.1e}, parameters {worst:.1e}")
        assert np.allclose(mesh_losses, losses, rtol=LOSS_TOLERANCE)
        assert np.allclose(mesh_norms, norms, rtol=1e-4)
        assert worst < PARAMETER_TOLERANCE


def test_parameters_and_moments_are_really_sharded():
    mesh = make_mesh(MeshConfig(1, 8))
    state = jax.jit(lambda key: init_train_state(key, TINY), out_shardings=state_shardings(TINY, mesh))(
        jax.random.key(0)
    )
    for tree in (state.model, state.opt_state):
        total = sum(x.nbytes for x in jax.tree.leaves(tree))
        here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
        assert here < 0.2 * total, "an eighth of the matrices, and the vectors whole"


def matrices_of(optimizer):
    """The optimizer for matrices alone, inside optax.masked: a state that has not the parameters' tree."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optimizer, decay_mask))


def test_moments_of_an_optimizer_of_another_shape_are_sharded_as_well(monkeypatch):
    mesh = make_mesh(MeshConfig(1, 8))
    monkeypatch.setattr(step_module, "make_optimizer", lambda config: matrices_of(optax.adamw(1e-3)))
    shardings = state_shardings(TINY, mesh)
    state = jax.jit(lambda key: init_train_state(key, TINY), out_shardings=shardings)(jax.random.key(0))
    moments = {name: x for name, x in named_arrays(state.opt_state).items() if ".mu." in name and x.ndim > 1}
    assert len(moments) > 10
    total = sum(x.nbytes for x in moments.values())
    assert sum(x.addressable_shards[0].data.nbytes for x in moments.values()) < 0.2 * total


def test_a_large_array_that_is_no_parameters_is_an_error(monkeypatch):
    extra = optax.GradientTransformation(lambda params: {"table": jnp.zeros((2048, 1024))}, lambda u, s, p=None: (u, s))
    monkeypatch.setattr(step_module, "make_optimizer", lambda config: optax.chain(optax.sgd(1.0), extra))
    with pytest.raises(UserError, match=r"1\.table of shape \(2048, 1024\) is shaped like no parameter"):
        state_shardings(TINY, make_mesh(MeshConfig(1, 8)))


@pytest.mark.parametrize("rows_per_device", [1, 2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(rows_per_device):
    whole_losses, whole_norms, _ = train_steps(TINY, one_device_mesh())
    config = dataclasses.replace(TINY, rows_per_device=rows_per_device)
    losses, norms, _ = train_steps(config, one_device_mesh())
    print(f"accumulation: {np.abs(losses / whole_losses - 1).max():.1e}, {np.abs(norms / whole_norms - 1).max():.1e}")
    assert losses[0] == pytest.approx(whole_losses[0], rel=ACCUMULATION_TOLERANCE)
    assert norms[0] == pytest.approx(whole_norms[0], rel=ACCUMULATION_TOLERANCE)


def test_loss_is_the_global_mean_over_labelled_tokens():
    batch, model = random_batch(), tiny_model()
    mesh = one_device_mesh()
    _, metrics = compile_train_step(TINY, mesh)(init_train_state(jax.random.key(0), TINY), to_global_batch(batch, mesh))
    hidden = model(*(jnp.asarray(x) for x in (batch.tokens, batch.images, batch.segment_ids, batch.positions)))
    log_probabilities = jax.nn.log_softmax(model.logits(hidden), axis=-1)
    counts = batch.labels != IGNORE
    picked = np.take_along_axis(np.asarray(log_probabilities), np.where(counts, batch.labels, 0)[..., None], -1)
    assert float(metrics.loss) == pytest.approx(-(picked[..., 0] * counts).sum() / counts.sum(), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_master_weights_stay_float32(dtype):
    _, _, parameters = train_steps(dataclasses.replace(TINY, compute_dtype=dtype), one_device_mesh(), num_steps=1)
    assert {value.dtype for value in parameters.values()} == {np.dtype(np.float32)}


def test_bfloat16_compute_gives_nearly_the_same_loss():
    exact, _, _ = train_steps(TINY, one_device_mesh(), num_steps=1)
    rounded, _, _ = train_steps(dataclasses.replace(TINY, compute_dtype="bfloat16"), one_device_mesh(), num_steps=1)
    assert rounded[0] == pytest.approx(exact[0], rel=2e-3)  # measured 1e-4
    assert rounded[0] != exact[0]


def test_frozen_parts_do_not_move():
    config = dataclasses.replace(TINY, trainable=TrainableConfig(vision=False, projector=True, decoder=False))
    _, _, after = train_steps(config, one_device_mesh(), num_steps=2)
    _, _, before = train_steps(config, one_device_mesh(), num_steps=0)
    for name, value in before.items():
        assert np.array_equal(after[name], value) != name.startswith("projector"), name


def test_every_matrix_is_sharded_and_every_vector_is_whole():
    shardings = named_arrays(parameter_shardings(jax.eval_shape(tiny_model), make_mesh(MeshConfig(1, 8))))
    for name, sharding in shardings.items():
        is_sharded = any(sharding.spec)
        assert is_sharded == name.endswith(("kernel", "embedding", "tokens")), name
