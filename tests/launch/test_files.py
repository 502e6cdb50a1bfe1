"""The job files of configs/launch name flags that the commands have; test_slurm.py runs those of Slurm."""

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from oq2vl_jax.train.__main__ import parse
from oq2vl_jax.train.watchdog import EXIT_CODE

LAUNCH = Path("configs/launch")


def test_skypilot_names_flags_of_training():
    file = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    words = shlex.split(file["run"].replace("\\\n", " ").replace('$(echo "$SKYPILOT_NODE_IPS" | head -n1)', "10.0.0.1"))
    values = {"$CONFIG": "tiny", "$RUN_DIR": "s3://bucket/run", "$ROWS": "s3://bucket/rows", "$SKYPILOT_NUM_NODES": "2",
              "$SKYPILOT_NODE_RANK": "1"}  # fmt: skip
    assert words[:3] == ["python", "-m", "oq2vl_jax.train"]
    command = parse([values.get(word, word) for word in words[3:]])
    assert (command.config.run_dir, command.config.data.sources) == ("s3://bucket/run", ("s3://bucket/rows",))
    assert (command.coordinator, command.num_processes, command.process_id) == ("10.0.0.1:6379", 2, 1)
    recovery = file["resources"]["job_recovery"]
    assert EXIT_CODE in recovery["recover_on_exit_codes"]
    assert 2 not in recovery["recover_on_exit_codes"]
    assert recovery["max_restarts_on_errors"] == 0


def test_jobset_names_flags_of_training():
    file = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    job = file["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    assert container["command"][:3] == ["python", "-m", "oq2vl_jax.train"]
    words = [*container["command"][3:], *container["args"]]
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in words]
    command = parse(["tiny" if word == "pretrain" else word for word in words])
    assert command.num_processes == job["completions"] == job["parallelism"]
    assert command.coordinator.startswith(f"{file['metadata']['name']}-train-0-0.{file['metadata']['name']}:")


@pytest.mark.parametrize("name", ["slurm_train.sbatch", "slurm_curate.sbatch"])
def test_the_files_of_slurm_are_whole(name):
    done = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(EXIT_CODE) in (LAUNCH / name).read_text() or "train" not in name
