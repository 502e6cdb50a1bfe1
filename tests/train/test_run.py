"""Whole runs of configs/tiny.py: resuming, killing, and what mistakes say."""

import dataclasses
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from oq2vl_jax.checkpoint import find_checkpoint
from oq2vl_jax.config import OptimizerConfig
from oq2vl_jax.errors import UserError
from oq2vl_jax.train import gradients
from oq2vl_jax.train.checkpointer import Checkpointer
from oq2vl_jax.train.run import run
from oq2vl_jax.train.watchdog import EXIT_CODE
from tests.train.conftest import TINY
from tests.xla_flags import FAST_COMPILING


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
    (environment,) = json.loads((run_dir / "environment.json").read_text())
    assert (environment["from_step"], environment["versions"]["jax"]) == (0, importlib.metadata.version("jax"))
    record = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert set(record) == {
        "step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "images_per_second", "fill",
        "data_wait_seconds", "model_tflops_per_device", "total_tokens", "total_labelled_tokens", "total_images",
        "total_model_flops", "training_seconds",
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


def test_a_nan_loss_stops_the_run_and_names_the_last_good_checkpoint(tiny_config, monkeypatch):
    config = tiny_config(num_steps=6)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every_num_steps=2))
    real = gradients.fused_gradients

    def poisoned(terms, trained, *others):
        is_fresh = trained.decoder.norm.scale[...].sum() == 64  # scale is 1 until it is trained
        loss, *found = real(terms, trained, *others)
        return loss + jnp.where(is_fresh, 0.0, jnp.nan), *found

    monkeypatch.setattr(gradients, "fused_gradients", poisoned)
    with pytest.raises(UserError, match=r"the loss is nan, .* at step \d; no checkpoint was saved yet"):
        run(config)
    assert not list((Path(config.run_dir) / "checkpoints").glob("0*"))


def train_command(run_dir, *flags):
    return [sys.executable, "-m", "oq2vl_jax.train", "configs/tiny.py", "--run-dir", str(run_dir), *flags]


ONE_DEVICE = os.environ | {"XLA_FLAGS": FAST_COMPILING}
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


def test_sigterm_saves_and_exits_as_a_run_that_is_not_done(tmp_path):
    flags = ("--num-steps", "100000", "--log-every", "1", "--checkpoint.every-num-steps", "100000")
    process = subprocess.Popen(
        train_command(tmp_path / "run", *flags), env=ONE_DEVICE, stdout=subprocess.PIPE, text=True
    )
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE
    stopped_at = int(output.strip().splitlines()[-1].split("stopped at step ")[1].split(";")[0])
    assert find_checkpoint(str(tmp_path / "run")).name == f"{stopped_at:06d}"
