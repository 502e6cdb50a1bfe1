"""Whole runs of configs/tiny.py: resuming, killing, meshes, accumulation, and what mistakes say."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oq2vl_jax.checkpoint import find_checkpoint
from oq2vl_jax.config import DataConfig, MeshConfig, OnlineConfig, OptimizerConfig, SyntheticConfig, TrainableConfig
from oq2vl_jax.data.loading.batch import IGNORE, Batch
from oq2vl_jax.errors import UserError
from oq2vl_jax.sharding import make_mesh, parameter_shardings, to_global_batch
from oq2vl_jax.train import gradients
from oq2vl_jax.train import step as step_module
from oq2vl_jax.train.checkpointer import Checkpointer
from oq2vl_jax.train.checks import check_config
from oq2vl_jax.train.optimizer import decay_mask
from oq2vl_jax.train.run import run
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


def test_loss_on_a_4x2_mesh_equals_1x1():
    # a large eps: with Adam's 1e-8 a gradient of 1e-9 moves a parameter by its sign, which rounding decides
    smooth = dataclasses.replace(TINY, optimizer=dataclasses.replace(TINY.optimizer, eps=1e-2))
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
    monkeypatch.setattr(step_module, "make_optimizer", lambda config, num_steps: matrices_of(optax.adamw(1e-3)))
    shardings = state_shardings(TINY, mesh)
    state = jax.jit(lambda key: init_train_state(key, TINY), out_shardings=shardings)(jax.random.key(0))
    moments = {name: x for name, x in named_arrays(state.opt_state).items() if ".mu." in name and x.ndim > 1}
    assert len(moments) > 10
    total = sum(x.nbytes for x in moments.values())
    assert sum(x.addressable_shards[0].data.nbytes for x in moments.values()) < 0.2 * total


def test_a_large_array_that_is_no_parameters_is_an_error(monkeypatch):
    extra = optax.GradientTransformation(lambda params: {"table": jnp.zeros((2048, 1024))}, lambda u, s, p=None: (u, s))
    monkeypatch.setattr(step_module, "make_optimizer", lambda config, num_steps: optax.chain(optax.sgd(1.0), extra))
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


def test_train_2_and_resume_2_equals_train_4(tiny_config):
    whole = run(tiny_config("whole", num_steps=4, log_every=1))
    assert run(tiny_config("parts", num_steps=4, log_every=1), stop_at_step=2) is None
    assert run(tiny_config("parts", num_steps=4, log_every=1)) == whole
    records = [
        [json.loads(line) for line in (Path(tiny_config(name).run_dir) / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert [r["step"] for r in records[0]] == [1, 2, 3, 4, 4]
    for left, right in zip(*records, strict=True):
        assert all(left[key] == right[key] for key in ("step", "loss", "grad_norm", "learning_rate"))
    assert records[0][-1]["parameters_sha256"] == whole


def test_a_finished_run_says_so_again_without_training(tiny_config, capsys):
    config = tiny_config(num_steps=2)
    digest = run(config)
    capsys.readouterr()
    assert run(config) == digest
    assert f"parameters_sha256 {digest}" in capsys.readouterr().out.splitlines()[-1]


def test_a_run_directory_and_its_checkpoint_hold_what_is_needed(tiny_config):
    config = tiny_config(num_steps=2, log_every=1)
    run(config)
    run_dir = Path(config.run_dir)
    assert json.loads((run_dir / "config.json").read_text())["num_steps"] == 2
    record = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert set(record) == {
        "step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "images_per_second", "fill",
        "data_wait_seconds", "model_tflops_per_device",
    }  # fmt: skip
    checkpoint = find_checkpoint(config.run_dir)
    assert {p.name for p in checkpoint.iterdir()} >= {"model", "optimizer", "loader", "config", "tokenizer"}
    assert (checkpoint / "tokenizer" / "tokenizer.json").is_file()


def test_another_configuration_in_the_same_run_dir_is_refused(tiny_config):
    run(tiny_config(num_steps=1))
    other = tiny_config(num_steps=1, optimizer=OptimizerConfig(learning_rate=1e-5, weight_decay=0.01))
    with pytest.raises(UserError, match=r"optimizer.learning_rate: 0.003 there, 1e-05 now"):
        run(other)
    run(tiny_config(num_steps=1, log_every=7))  # operational fields may change


def test_weights_only_start_takes_weights_and_nothing_else(tiny_config):
    first = tiny_config("first", num_steps=2)
    run(first)
    second = tiny_config("second", num_steps=1, init_from=first.run_dir)
    run(second, stop_at_step=1)
    fresh = tiny_config("fresh", num_steps=1)
    run(fresh)
    losses = [
        json.loads((Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
        for config in (first, second, fresh)
    ]
    assert losses[1] < losses[2], "the weights of the first run were taken"


def test_a_checkpoint_of_another_configuration_is_explained(tiny_config):
    first = tiny_config("first", num_steps=1)
    run(first)
    decoder = dataclasses.replace(TINY.model.decoder, intermediate_size=64, num_layers=3)
    model = dataclasses.replace(TINY.model, decoder=decoder)
    second = tiny_config("second", num_steps=1, init_from=first.run_dir, model=model)
    with pytest.raises(UserError, match=r"checkpoint is of another configuration: .*shape \(2, 64.* expected \(3, 64"):
        run(second)
    with pytest.raises(UserError, match="no whole checkpoint here"):
        run(tiny_config("third", num_steps=1, init_from="nowhere"))


def test_a_half_written_checkpoint_is_never_taken_for_a_whole_one(tiny_config):
    config = tiny_config(num_steps=2)
    run(config)
    checkpoints = Path(config.run_dir) / "checkpoints"
    half = checkpoints / "000009.orbax-checkpoint-tmp"
    (half / "model").mkdir(parents=True)
    (half / "config").mkdir()
    assert find_checkpoint(config.run_dir).name == "000002"
    checkpointer = Checkpointer(Path(config.run_dir), keep=2)
    assert checkpointer.latest_step() == 2
    checkpointer.close()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"global_batch_size": 12}, "global_batch_size = 12 cannot be divided over 8 devices; use a multiple of 8"),
        ({"rows_per_device": 3}, "rows_per_device = 3 on 8 devices does not divide global_batch_size = 8"),
        ({"mesh": MeshConfig(3, -1)}, "mesh.data = 3 times mesh.fsdp = -1 does not fit 8 devices"),
        ({"num_steps": 0}, "num_steps must be 1 to 2,147,483,647, got 0"),
        ({"trainable": TrainableConfig(False, False, False)}, "nothing is trained"),
        ({"data": DataConfig(128, 8)}, "data.sources is empty"),
    ],
)
def test_impossible_configurations_are_one_sentence(tiny_config, overrides, message):
    with pytest.raises(UserError, match=message):
        run(tiny_config(**overrides))


def test_a_nan_loss_stops_the_run_and_names_the_last_good_checkpoint(tiny_config, monkeypatch):
    config = tiny_config(num_steps=6)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every_num_steps=2))
    real = gradients.microbatch_gradients

    def poisoned(trained, *others):
        is_fresh = trained.decoder.norm.scale[...].sum() == 64  # scale is 1 until it is trained
        loss, *found = real(trained, *others)
        return loss + jnp.where(is_fresh, 0.0, jnp.nan), *found

    monkeypatch.setattr(gradients, "microbatch_gradients", poisoned)
    with pytest.raises(UserError, match=r"the loss is nan, .* at step \d; no checkpoint was saved yet"):
        run(config)
    assert not list((Path(config.run_dir) / "checkpoints").glob("0*"))


def train_command(run_dir, *flags):
    return [sys.executable, "-m", "oq2vl_jax.train", "configs/tiny.py", "--run-dir", str(run_dir), *flags]


ONE_DEVICE = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
SHORT = ("--num-steps", "16", "--checkpoint.every-num-steps", "4", "--log-every", "1")


def last_digest(output):
    return output.strip().splitlines()[-1].split("parameters_sha256 ")[1]


def wait_for_step(run_dir, step, process):
    metrics = Path(run_dir) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached; exit code {process.poll()}")


@pytest.mark.parametrize("steps", [(6,), pytest.param((1, 3, 6, 9), marks=pytest.mark.slow)])
def test_killed_by_sigkill_and_started_again_ends_in_the_same_bits(tmp_path, steps):
    undisturbed = subprocess.run(
        train_command(tmp_path / "a", *SHORT), env=ONE_DEVICE, capture_output=True, text=True, check=True
    )
    for step in steps:
        process = subprocess.Popen(train_command(tmp_path / "b", *SHORT), env=ONE_DEVICE, stdout=subprocess.DEVNULL)
        wait_for_step(tmp_path / "b", step, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    resumed = subprocess.run(
        train_command(tmp_path / "b", *SHORT), env=ONE_DEVICE, capture_output=True, text=True, check=True
    )
    assert last_digest(resumed.stdout) == last_digest(undisturbed.stdout)


def test_sigterm_saves_and_exits_zero(tmp_path):
    flags = ("--num-steps", "100000", "--log-every", "1", "--checkpoint.every-num-steps", "100000")
    process = subprocess.Popen(
        train_command(tmp_path / "run", *flags), env=ONE_DEVICE, stdout=subprocess.PIPE, text=True
    )
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    stopped_at = int(output.strip().splitlines()[-1].split("stopped at step ")[1].split(";")[0])
    assert find_checkpoint(str(tmp_path / "run")).name == f"{stopped_at:06d}"


def test_every_matrix_is_sharded_and_every_vector_is_whole():
    shardings = named_arrays(parameter_shardings(jax.eval_shape(tiny_model), make_mesh(MeshConfig(1, 8))))
    for name, sharding in shardings.items():
        is_sharded = any(sharding.spec)
        assert is_sharded == name.endswith(("kernel", "embedding", "tokens")), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "packed"}, "data.sources is empty"),
        ({"kind": "online", "sources": ("a.tar",)}, "data.kind = online needs data.online.tokenizer"),
        (
            {"sources": ("packed",)},
            "data.kind = synthetic makes its own rows; leave data.sources out, or set data.kind",
        ),
        ({"weights": (1.0,)}, "data.kind = synthetic mixes no data.weights"),
        ({"online": OnlineConfig(window=8)}, "data.online is set, but data.kind is synthetic; set data.kind = online"),
        (
            {"kind": "packed", "sources": ("packed",), "synthetic": SyntheticConfig(8)},
            "data.synthetic is set, but data.kind is packed; set data.kind = synthetic, or leave it out",
        ),
    ],
)
def test_settings_of_another_kind_of_data_are_refused(changes, message):
    config = dataclasses.replace(TINY, data=dataclasses.replace(TINY.data, **changes))
    with pytest.raises(UserError, match=message):
        check_config(config, num_devices=8)
