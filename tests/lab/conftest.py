"""An ablation of the smallest model, of two arms and two seeds, as a file and finished."""

import contextlib
from pathlib import Path

import pytest

from oq2vl_jax.ablate import RunCommand, run
from oq2vl_jax.config_files import load_config
from oq2vl_jax.errors import UserError
from oq2vl_jax.lab import worker
from oq2vl_jax.lab.definition import Ablation
from oq2vl_jax.train.run import run as train

TINY = str(Path("configs/tiny.py").absolute())
NUM_STEPS = 3

DEFINITION = f"""
from oq2vl_jax.lab.definition import Ablation

ablation = Ablation(
    question="Does a larger rate help?",
    stages={{"first": {TINY!r}}},
    arms={{"base": {{"*.num_steps": {NUM_STEPS}, "*.log_every": 1}},
          "fast": {{"*.num_steps": {NUM_STEPS}, "*.log_every": 1, "first.optimizer.learning_rate": 9e-3}}}},
    baseline="base",
    seeds=(1, 2),
    primary="loss",
    smallest_effect=0.1,
)
"""
TWO_STAGES = DEFINITION.replace(f'{{"first": {TINY!r}}}', f'{{"first": {TINY!r}, "second": {TINY!r}}}').replace(
    '"first.optimizer', '"second.optimizer'
)


def tiny(**changes):
    values = {
        "question": "Does it help?", "stages": {"shapes": TINY}, "arms": {"base": {}, "other": {}}, "baseline": "base",
        "primary": "loss", "smallest_effect": 0.1, "seeds": (1, 2),
    }  # fmt: skip
    return Ablation(**(values | changes))


@pytest.fixture(scope="module")
def definition(tmp_path_factory):
    file = tmp_path_factory.mktemp("definition") / "rate.py"
    file.write_text(DEFINITION)
    return str(file)


def train_here(what, out, cell, words, log):
    """Runs a stage in this process, which compiles once for all cells."""
    assert words[0] == "oq2vl_jax.train"
    with log.open("a") as file, contextlib.redirect_stdout(file):
        try:
            train(load_config(words[1]))
        except UserError as error:
            raise worker.CommandError(f"{what}: {error}") from error


@pytest.fixture(scope="module")
def finished(definition, tmp_path_factory):
    """The folder of an ablation that one worker ran without disturbance."""
    out = str(tmp_path_factory.mktemp("ablation") / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "run_child", train_here)
        assert run(RunCommand(definition, out)) == 0
    return Path(out)
