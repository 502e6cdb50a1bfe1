"""A run that hangs, or whose other process was killed, ends with a sentence that says who waits for what."""

import json
import signal
import subprocess
import sys
import time

import pytest

from oq2vl_jax.errors import UserError
from oq2vl_jax.runtime import LAUNCHERS, check_started_once
from oq2vl_jax.train import watchdog as watchdogs
from oq2vl_jax.train.watchdog import Watchdog, watched
from tests.train.test_processes import free_port, start, together

HANGS = """
import sys, time
from pathlib import Path
from oq2vl_jax.train.watchdog import Watchdog, watched
dog = Watchdog(Path(sys.argv[1]), 1.5)
with watched(dog):
    for step in range(1, 5):
        dog.doing("wait for data", step)
        time.sleep(0.8)
    time.sleep(60)
"""


def test_a_run_that_hangs_says_where_and_ends(tmp_path):
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path)], capture_output=True, text=True)
    assert time.monotonic() - start < 40
    assert done.returncode == watchdogs.EXIT_CODE
    assert "at step 4, " in done.stderr
    assert 's in "wait for data", nothing moved for --hang-seconds 1.5; it runs alone' in done.stderr
    assert "Traceback" not in done.stderr
    stacks = (tmp_path / "processes" / "0" / "stacks.txt").read_text()
    assert f'File "<string>", line {HANGS.splitlines().index("    time.sleep(60)") + 1} in' in stacks


@pytest.fixture
def quick(monkeypatch):
    """Ends are noted instead of ending the tests."""
    ends = []

    def end(self, what, why, code):
        ends.append((what, why, code))
        self._ended.set()

    monkeypatch.setattr(Watchdog, "_end", end)
    monkeypatch.setattr(watchdogs, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(watchdogs, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(watchdogs, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(watchdogs, "wait_for_all", lambda name: None)
    monkeypatch.setattr(watchdogs, "on_abort", lambda function: None)
    return ends


def until(ends, seconds=10.0):
    end = time.monotonic() + seconds
    while not ends and time.monotonic() < end:
        time.sleep(0.05)
    return ends


def say(folder, index, **state):
    file = folder / "processes" / str(index) / "alive.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    said = {"host": "node7", "pid": 4711, "step": 3, "doing": "step", "seconds": 2, "beat": 1, "ended": None}
    file.write_text(json.dumps(said | state))


def test_who_says_nothing_any_more_is_named(quick, tmp_path):
    dog = Watchdog(tmp_path, None, 0, 2)
    with watched(dog):
        say(tmp_path, 1)
        assert until(quick)
    (what, why, code), *_ = quick
    assert what == "others are waited for in vain"
    assert why.startswith("process 1 (pid 4711 on node7) said nothing for 1 s")
    assert code == watchdogs.EXIT_CODE


def test_who_failed_takes_the_others_along_with_its_reason_and_its_code(quick, tmp_path):
    with watched(Watchdog(tmp_path, None, 0, 2)):
        say(tmp_path, 1, ended="rows-00001 is damaged", exit_code=2)
        assert until(quick)
    assert quick[0][1:] == ("process 1 on node7 ended: rows-00001 is damaged", 2)


def test_who_lives_or_is_done_is_let_be(quick, tmp_path):
    with watched(Watchdog(tmp_path, None, 0, 3)):
        say(tmp_path, 2, ended="")
        for beat in range(25):
            say(tmp_path, 1, beat=beat)
            time.sleep(0.1)
    assert not quick


def test_a_failure_is_told_to_the_others(quick, tmp_path):
    def fails():
        with watched(Watchdog(tmp_path, None, 1, 2)):
            say(tmp_path, 0)
            raise UserError("the loss is nan")

    with pytest.raises(UserError, match="nan"):
        fails()
    said = json.loads((tmp_path / "processes" / "1" / "alive.json").read_text())
    assert (said["ended"], said["exit_code"]) == ("the loss is nan", 2)


def test_an_interrupted_run_is_not_ended_later(quick, tmp_path):
    """As in a notebook, which goes on after Ctrl-C."""
    dog = Watchdog(tmp_path, 0.3)

    def interrupted():
        with watched(dog):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    time.sleep(0.8)
    assert not quick
    assert not dog._thread.is_alive()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_several_tasks_that_do_not_know_of_each_other_are_refused(launcher, monkeypatch):
    monkeypatch.setenv(launcher, "1")
    check_started_once()
    monkeypatch.setenv(launcher, "2")
    with pytest.raises(UserError, match=f"{LAUNCHERS[launcher]} started 2 tasks"):
        check_started_once()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_with_a_sentence_and_the_command_goes_on(victim, tmp_path):
    flags = ("--num-steps", "100000", "--checkpoint.every-num-steps", "20", "--log-every", "1")
    port = free_port()
    both = [start(tmp_path / "run", *flags, index=i, port=port) for i in range(2)]
    steps = tmp_path / "run" / "metrics.jsonl"
    try:
        while not steps.exists() or len(steps.read_text().splitlines()) < 45:
            time.sleep(0.2)
        both[victim].send_signal(signal.SIGKILL)
        out, _ = both[1 - victim].communicate(timeout=watchdogs.SILENT_SECONDS + 60)
    finally:
        for process in both:
            process.kill()
    assert both[1 - victim].returncode == watchdogs.EXIT_CODE, out
    last = out.strip().splitlines()[-1]
    assert last.startswith(f"error: process {1 - victim} of 2: at step ")
    assert f"process {victim} (pid {both[victim].pid}" in last
    before = len(steps.read_text().splitlines())
    outputs = together(tmp_path / "run", *flags, stop_when=lambda: len(steps.read_text().splitlines()) > before + 5)
    assert "resuming from step" in outputs[0]
