"""Two processes of four simulated devices each: one run, the numbers of a single process, its checkpoints shared."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oq2vl_jax.train.run import run
from oq2vl_jax.train.watchdog import EXIT_CODE
from tests.xla_flags import devices

LOSS_TOLERANCE = 2e-6  # relative, 2 x 4 devices against 1 x 8; measured 0


def start(run_dir, *flags, index, port, count=2):
    environment = os.environ | {"XLA_FLAGS": devices(4)}
    command = [sys.executable, "-m", "oq2vl_jax.train", "configs/tiny.py", "--run-dir", str(run_dir), *flags]
    command += ["--coordinator", f"localhost:{port}", "--num-processes", str(count), "--process-id", str(index)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def together(run_dir, *flags, stop_when=None):
    """Outputs of two processes; both get SIGTERM when stop_when() is true."""
    port = free_port()
    processes = [start(run_dir, *flags, index=i, port=port) for i in range(2)]
    try:
        while stop_when and not stop_when() and processes[0].poll() is None:
            time.sleep(0.05)
        if stop_when:
            for process in processes:
                process.send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    code = EXIT_CODE if stop_when else 0
    assert [process.returncode for process in processes] == [code, code], "\n---\n".join(outputs)
    return outputs


def records(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def last_digest_of(output):
    return output.split("parameters_sha256 ")[1].split()[0]


def equal_losses(ours, theirs):
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=LOSS_TOLERANCE)


def test_two_processes_are_one_run(tmp_path, tiny_config):
    run(tiny_config("alone", num_steps=2, log_every=1))
    outputs = together(tmp_path / "both", "--num-steps", "2", "--log-every", "1")
    assert "done: step 2" in outputs[0]
    assert "step" not in outputs[1], "the first process speaks for all"
    equal_losses(records(tmp_path / "both"), records(tmp_path / "alone"))


@pytest.mark.slow
def test_processes_stop_together_and_go_on_together(tmp_path, tiny_config):
    """FSDP over both; SIGTERM makes them agree on a step and save; one process goes on from their checkpoint."""
    flags = ("--log-every", "1", "--mesh.sharding", "fsdp")
    seen = tmp_path / "stopped" / "metrics.jsonl"
    outputs = together(
        tmp_path / "stopped", "--num-steps", "400", *flags, stop_when=lambda: seen.exists() and "\n" in seen.read_text()
    )
    assert "checkpoint saved" in outputs[0]
    step = max(int(path.name) for path in (tmp_path / "stopped" / "checkpoints").iterdir())
    assert 1 <= step < 400
    assert run(tiny_config("stopped", num_steps=400, log_every=1), stop_at_step=step + 2) is None
    run(tiny_config("alone", num_steps=400, log_every=1), stop_at_step=step + 2)
    equal_losses(records(tmp_path / "stopped"), records(tmp_path / "alone"))


def test_three_numbers_belong_together(tmp_path):
    command = [sys.executable, "-m", "oq2vl_jax.train", "configs/tiny.py", "--num-processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "belong together" in done.stderr
    assert "Traceback" not in done.stderr
