"""The job files of configs/launch on a real Slurm, of one node on this machine. `make test-slurm`."""

import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from oq2vl_jax.config_files import load_config
from oq2vl_jax.data.packing.synthetic import captioned_shapes
from oq2vl_jax.data.text.bpe import BYTE_RANKS, save_bpe_tokenizer
from tests.launch.cluster import ask, cluster, start_now, state, submit, wait_for
from tests.xla_flags import devices

pytestmark = pytest.mark.slurm
LAUNCH = Path("configs/launch").absolute()
ON_THIS_MACHINE = ("--gpus-per-node", "0", "--cpus-per-task", "1", "--ntasks-per-node", "2")
NUM_STEPS = 500


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment | {"OQ2VL_PYTHON": sys.executable, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu",
                             "OMP_NUM_THREADS": "1"}  # fmt: skip


def logs(folder):
    return "".join(path.read_text() for path in sorted(folder.glob("*.log")))


def losses(run_dir):
    import json

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def test_a_job_that_is_signalled_goes_on_in_the_queue_and_ends_as_one_process(slurm, tmp_path):
    """Two tasks of two devices; TERM as before a time limit, then one task killed; against one process of four."""
    flags = ("tiny", "--num-steps", str(NUM_STEPS), "--checkpoint.every-num-steps", "100")
    environment = slurm | {"XLA_FLAGS": devices(2)}
    job = submit(
        environment, *ON_THIS_MACHINE, str(LAUNCH / "slurm_train.sbatch"), *flags, "--run-dir", str(tmp_path / "run"),
        cwd=tmp_path,
    )  # fmt: skip
    steps = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: steps.exists() and len(steps.read_text().splitlines()) > 8, 240)
    ask(environment, "scancel", "--batch", "--signal=TERM", job)  # as --signal=B:TERM does
    wait_for(lambda: state(environment, job) == "PENDING", 120)
    assert "stopped at step" in logs(tmp_path)
    wait_for(lambda: start_now(environment, job) or "resuming from step" in logs(tmp_path), 240)
    seen = len(steps.read_text().splitlines())
    wait_for(lambda: len(steps.read_text().splitlines()) > seen + 15, 300)
    victim = ask(environment, "pgrep", "-f", f"oq2vl_jax.train.*{tmp_path}/run.*--distributed").splitlines()[-1]
    os.kill(int(victim), 9)
    wait_for(lambda: state(environment, job) == "PENDING", 180)
    assert re.search(r"error: process \d of 2: at step ", logs(tmp_path))
    wait_for(lambda: start_now(environment, job) or state(environment, job) in ("COMPLETED", "FAILED"), 600)
    assert state(environment, job) == "COMPLETED", logs(tmp_path)[-3000:]
    assert "parameters_sha256" in logs(tmp_path)
    assert logs(tmp_path).count("resuming from step") == 2
    alone = subprocess.run(
        [sys.executable, "-m", "oq2vl_jax.train", *flags, "--run-dir", str(tmp_path / "alone")],
        env=slurm | {"XLA_FLAGS": devices(4)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "parameters_sha256" in alone.stdout
    together, one = losses(tmp_path / "run"), losses(tmp_path / "alone")
    assert together.keys() == one.keys()
    first = [step for step in one if step <= 50]
    worst = max(abs(together[step] / one[step] - 1) for step in first)
    print(f"losses of steps up to 50 differ by at most {worst:.1e} of themselves")
    assert worst < 1e-4  # measured 1e-6: two processes sum gradients otherwise


def test_srun_without_distributed_is_refused(slurm, tmp_path):
    script = f"srun -n 2 {sys.executable} -m oq2vl_jax.train tiny --run-dir {tmp_path}/run --num-steps 2"
    job = submit(slurm, "-n", "2", "--wrap", script, "--output", str(tmp_path / "job.log"), cwd=tmp_path)
    wait_for(lambda: state(slurm, job) in ("COMPLETED", "FAILED"), 120)
    assert "srun started 2 tasks of this command" in logs(tmp_path)
    assert "Traceback" not in logs(tmp_path)
    assert not (tmp_path / "run").exists()


def test_an_array_packs_the_bytes_of_one_process_though_a_task_is_killed(slurm, tmp_path):
    from webdataset import TarWriter

    config = dataclasses.replace(load_config("tiny"))
    samples = list(captioned_shapes(1200, 1))
    for i in range(12):
        with TarWriter(str(tmp_path / f"{i:05d}.tar"), mtime=0) as writer:
            for sample in samples[i::12]:
                writer.write(sample)
    save_bpe_tokenizer(BYTE_RANKS, str(tmp_path / "tokenizer"))
    flags = ("--shards", f"{tmp_path}/*.tar", "--tokenizer", str(tmp_path / "tokenizer"), "--num-tokens", "128",
             "--max-images", "8", "--visual-tokens", str(config.model.num_visual_tokens))  # fmt: skip
    one = [sys.executable, "-m", "oq2vl_jax.data.pack", *flags, "--out", str(tmp_path / "one"), "--num-workers", "1"]
    subprocess.run(one, check=True, capture_output=True, env=slurm)
    job = submit(
        slurm, "--array", "3-6", "--cpus-per-task", "1", "--mem-per-cpu", "1G", str(LAUNCH / "slurm_curate.sbatch"),
        "data.pack", *flags, "--out", str(tmp_path / "array"), cwd=tmp_path,
    )  # fmt: skip
    wait_for(lambda: state(slurm, f"{job}_4") == "RUNNING", 120)
    ask(slurm, "scontrol", "requeue", f"{job}_4")
    start_now(slurm, f"{job}_4")
    wait_for(lambda: start_now(slurm, f"{job}_4") or state(slurm, job) in ("COMPLETED", "FAILED"), 300)
    assert state(slurm, job) == "COMPLETED", logs(tmp_path)
    rows = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "one").glob("*.array_record")
    }
    again = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "array").glob("*.array_record")
    }
    assert again == rows
    assert (tmp_path / "array" / "manifest.json").exists()
    shutil.rmtree(tmp_path / "array")
