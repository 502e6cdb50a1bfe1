"""docs/extend.md: each trial change touches as many files as the page says, and works from the command line.

The package is copied, the change applied, and the copy run in processes of its own.
"""

import csv
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from oq2vl_jax.config_files import with_value
from oq2vl_jax.data.packing.packed import PackedRows, read_manifest
from oq2vl_jax.train.run import run
from tests.data.conftest import png
from tests.generate.conftest import checkpoint  # noqa: F401
from tests.train.conftest import tiny_config  # noqa: F401
from tests.xla_flags import FAST_COMPILING

EXAMPLES = Path("docs/examples")
DIFFS = {"schedule": ("--schedule.kind", "linear"), "decoder": ()}
"""Changes of the package, with the flags that use them."""
OWN = {
    "own_projector": ("--model.projector.own", "MaxPool"),
    "own_optimizer": ("--optimizer.own", "lion"),
    "own_schedule": ("--schedule.own", "inverse_root"),
}
"""Files outside the package, with the flag and the name that use them."""
FILES = {
    "source": "oq2vl_jax/data/samples/formats/csv_captions.py",
    "benchmark": "oq2vl_jax/eval/benchmarks/brightness.py",
}


def files_of(name):
    return re.findall(r"^\+\+\+ b/(\S+)$", (EXAMPLES / f"{name}.diff").read_text(), re.M)


def copied(folder):
    for name in ("oq2vl_jax", "convert", "configs"):
        shutil.copytree(name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def call(folder, *command):
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "XLA_FLAGS": FAST_COMPILING,
    }
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", DIFFS)
def test_a_trial_change_applies_and_touches_as_many_files_as_the_page_says(name, tmp_path):
    files = files_of(name)
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, tmp_path / file)
    subprocess.run(["git", "apply", str((EXAMPLES / f"{name}.diff").absolute())], cwd=tmp_path, check=True)
    assert all((tmp_path / file).read_text() != Path(file).read_text() for file in files)
    row = next(line for line in Path("docs/extend.md").read_text().splitlines() if f"examples/{name}.diff" in line)
    assert len(files) == int(row.split("|")[2].split()[0])
    assert all(f"`{file}`" in row for file in files)


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFS)
def test_a_trial_change_trains_resumes_and_leaves(name, tmp_path):
    """4 steps and 2 + 2 end in the same bits; the export answers as the checkpoint does, or holds the new weights."""
    copied(tmp_path)
    subprocess.run(["git", "apply", str((EXAMPLES / f"{name}.diff").absolute())], cwd=tmp_path, check=True)
    flags = ("--num-steps", "4", "--checkpoint.every-num-steps", "2", *DIFFS[name])
    whole = call(tmp_path, "oq2vl_jax.train", "tiny", "--run-dir", "whole", *flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/000004")
    parts = call(tmp_path, "oq2vl_jax.train", "tiny", "--run-dir", "parts", *flags)
    assert "resuming from step 2" in parts
    assert whole.split()[-1] == parts.split()[-1]
    call(tmp_path, "convert.to_hf", "whole", "--out", "exported", "--dtype", "float32")
    if name == "decoder":
        from safetensors import safe_open

        with safe_open(next(tmp_path.glob("exported/*.safetensors")), "np") as tensors:
            assert "model.language_model.layers.1.post_feedforward_layernorm.weight" in set(tensors.keys())
        return
    (tmp_path / "picture.png").write_bytes(png())
    ask = ("--image", "picture.png", "--prompt", "what?", "--same-as", "whole", "--trust-remote-code")
    assert "the same reply" in call(tmp_path, "convert.ask_hf", "exported", *ask)


@pytest.mark.parametrize(
    "name", [name if name == "own_projector" else pytest.param(name, marks=pytest.mark.slow) for name in OWN]
)
def test_a_file_outside_the_package_trains_and_resumes(name, tiny_config):  # noqa: F811
    """The command that the example shows, as the flag sets the configuration."""
    flag, function = OWN[name]
    text = (EXAMPLES / f"{name}.py").read_text()
    assert f"{flag} docs/examples/{name}.py:{function}" in text
    base = tiny_config("whole", num_steps=2)
    config = with_value(base, flag.removeprefix("--"), f"docs/examples/{name}.py:{function}")
    whole = run(config)
    parts = dataclasses.replace(config, run_dir=tiny_config("parts").run_dir)
    assert run(parts, stop_at_step=1) is None
    assert run(parts) == whole
    assert run(dataclasses.replace(base, run_dir=tiny_config("ours").run_dir)) != whole


def python(*arguments):
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_programs_run_as_the_page_says(tmp_path):
    """The loop of one's own has the losses of run; the probe and the distillation take its checkpoint."""
    trained = python("-m", "oq2vl_jax.train", "tiny", "--run-dir", tmp_path / "run", "--num-steps", 5, "--log-every", 1)
    losses = re.findall(r"loss (\S+)", trained)
    assert re.findall(r"loss (\S+)", python(EXAMPLES / "own_loop.py", "--num-steps", 5)) == losses
    own_loss = python(EXAMPLES / "own_loss.py", "--teacher", tmp_path / "run", "--run-dir", tmp_path / "student")
    assert "done: step 4" in own_loss
    assert re.findall(r"loss (\S+)", own_loss)[0] != losses[0]
    assert float(python(EXAMPLES / "probe.py", "--checkpoint", tmp_path / "run").split()[1]) > 0.33


@pytest.mark.parametrize("name", FILES)
def test_one_new_file_is_enough(name, tmp_path, byte_tokenizer_folder, checkpoint):  # noqa: F811
    copied(tmp_path)
    shutil.copyfile(EXAMPLES / f"{name}.py", tmp_path / FILES[name])
    (tmp_path / "picture.png").write_bytes(png())
    if name == "source":
        with open(tmp_path / "captions.csv", "w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), ("picture.png", "a cat"), ("none.png", "a dog")])
        budgets = ("--num-tokens", "64", "--max-images", "2", "--visual-tokens", "4", "--template", "plain")
        call(tmp_path, "oq2vl_jax.data.pack", "--shards", "captions.csv", "--images", ".", "--out", "packed",
             "--tokenizer", byte_tokenizer_folder, *budgets)  # fmt: skip
        manifest = read_manifest(str(tmp_path / "packed"))
        assert (manifest["documents"], manifest["skipped"]) == (1, {"image_missing": 1})
        assert len(PackedRows(str(tmp_path / "packed"))) == 1
        return
    rows = [{"index": i, "image": {"bytes": png(seed=i), "path": None}, "answer": "dark"} for i in range(3)]
    pl.DataFrame(rows).write_parquet(tmp_path / "brightness.parquet")
    printed = call(tmp_path, "oq2vl_jax.eval", "--checkpoint", checkpoint, "--tasks", "brightness", "--data", ".",
                   "--out", "results", "--method", "options")  # fmt: skip
    assert re.search(r"brightness \(official, options\): [\d.]+ % .* of 3", printed)
