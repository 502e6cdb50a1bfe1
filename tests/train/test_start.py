"""What a run starts from: parts of a checkpoint, its optimizer, its model, and the two seeds."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from oq2vl_jax.checkpoint import find_checkpoint
from oq2vl_jax.config import ScheduleConfig
from oq2vl_jax.errors import UserError
from oq2vl_jax.train.run import run
from oq2vl_jax.trees import named_arrays
from oq2vl_jax.weights import load_weights
from tests.train.conftest import TINY, tiny_model
from tests.train.test_own_code import losses


def parameters(run_dir):
    return {k: np.asarray(v) for k, v in named_arrays(load_weights(find_checkpoint(run_dir), tiny_model())).items()}


def test_parts_of_a_start_and_its_optimizer(tiny_config):
    trunk = tiny_config("trunk", num_steps=4, schedule=ScheduleConfig("constant"))
    run(dataclasses.replace(trunk, checkpoint=dataclasses.replace(TINY.checkpoint, every_num_steps=2)))
    begun = {"num_steps": 1, "schedule": ScheduleConfig("constant", 0.0)}
    frozen = dataclasses.replace(TINY.optimizer, learning_rate=1e-30)
    some = tiny_config(
        "some", init_from=f"{trunk.run_dir}@2", init_parts=("decoder",), optimizer=frozen, seed=3, **begun
    )
    fresh = tiny_config("fresh", optimizer=frozen, seed=3, **begun)
    run(some)
    run(fresh)
    ours, theirs, drawn = parameters(some.run_dir), parameters(f"{trunk.run_dir}@2"), parameters(fresh.run_dir)
    for name, value in ours.items():
        expected = (theirs if name.startswith("decoder.") else drawn)[name]
        np.testing.assert_allclose(value, expected, atol=1e-20)  # one step at a learning rate of 1e-30
    decay = {"num_steps": 2, "schedule": ScheduleConfig("wsd", 0.0, 1.0), "init_from": f"{trunk.run_dir}@4"}
    branch = tiny_config("branch", init_optimizer=True, **decay)
    digest = run(branch)
    assert run(tiny_config("without", **decay)) != digest
    muon = dataclasses.replace(TINY.optimizer, kind="muon")
    with pytest.raises(UserError, match="of another configuration"):
        run(tiny_config("muon", init_optimizer=True, optimizer=muon, **decay))
    with pytest.raises(UserError, match=r"no checkpoint of step 3; .*trunk holds 2, 4"):
        run(tiny_config("none", init_from=f"{trunk.run_dir}@3", num_steps=1))
    with pytest.raises(UserError, match="init_optimizer is set, but init_from is not"):
        run(tiny_config("none", init_optimizer=True))


def test_the_seed_of_the_order_is_a_seed_of_its_own(tiny_config):
    def first_loss(name, seed, data_seed):
        config = tiny_config(name, num_steps=1, log_every=1, seed=seed)
        run(dataclasses.replace(config, data=dataclasses.replace(config.data, seed=data_seed)))
        return losses(config.run_dir)[0]

    assert first_loss("a", 7, None) == first_loss("b", 7, 7)
    assert len({first_loss("c", 7, 8), first_loss("d", 8, 7), first_loss("a2", 7, 7)}) == 3


def test_a_configuration_without_a_model_takes_that_of_its_start(tiny_config, tmp_path):
    trunk = tiny_config("trunk", num_steps=1, model=dataclasses.replace(TINY.model, num_visual_tokens=16))
    run(trunk)
    file = tmp_path / "tune.py"
    file.write_text(
        "from oq2vl_jax.config import DataConfig, OptimizerConfig, TrainConfig\n"
        "config = TrainConfig(data=DataConfig(num_tokens=128, max_images=4, kind='synthetic', template='plain'),\n"
        "    optimizer=OptimizerConfig(1e-3, 0.0), num_steps=1, global_batch_size=8, run_dir='runs/tune')\n"
    )
    command = [sys.executable, "-m", "oq2vl_jax.train", str(file), "--dry-run"]
    done = subprocess.run([*command, f"--init-from={trunk.run_dir}"], capture_output=True, text=True)
    assert '"num_visual_tokens": 16' in done.stdout, done.stderr
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "has no model; give --init-from, whose model it takes" in done.stderr
