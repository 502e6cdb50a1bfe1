"""One training per run directory; the lock of a dead owner is taken over."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from oq2vl_jax import lock as lock_module
from oq2vl_jax.errors import UserError
from oq2vl_jax.lock import FILE, run_lock

HOLDER = "import sys, time; from pathlib import Path; from oq2vl_jax.lock import run_lock\n" \
         "with run_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"  # fmt: skip


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_training_is_refused_and_a_killed_owner_is_followed(holder, tmp_path):
    with (
        pytest.raises(UserError, match=rf"is trained by process {holder.pid} on {socket.gethostname()}"),
        run_lock(tmp_path),
    ):
        pass
    assert json.loads((tmp_path / FILE).read_text())["pid"] == holder.pid
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with run_lock(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_the_command_says_so_in_one_sentence(holder, tmp_path):
    command = [sys.executable, "-m", "oq2vl_jax.train", "configs/tiny.py", "--run-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "is trained by process" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == [FILE]


@pytest.mark.parametrize(("age", "is_refused"), [(5, True), (1000, False)])
def test_an_owner_elsewhere_is_known_by_its_heartbeat(age, is_refused, tmp_path):
    file = tmp_path / FILE
    file.write_text(json.dumps({"host": "another", "pid": 1, "token": "x"}))
    os.utime(file, (time.time() - age,) * 2)
    if is_refused:
        with pytest.raises(UserError, match="process 1 on another"), run_lock(tmp_path):
            pass
        return
    with run_lock(tmp_path):
        pass


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.05)
    with run_lock(tmp_path):
        os.utime(tmp_path / FILE, (0, 0))
        time.sleep(0.5)
        assert time.time() - (tmp_path / FILE).stat().st_mtime < 10


@pytest.mark.parametrize("content", ["", "[]", "{", '{"pid": "x"}'])
def test_a_damaged_lock_is_nobodys(content, tmp_path):
    (tmp_path / FILE).write_text(content)
    with run_lock(tmp_path):
        pass


def test_an_owner_that_slept_keeps_its_lock(tmp_path):
    """A laptop that was closed: the process is the same, its heartbeat is old."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        os.utime(tmp_path / FILE, (time.time() - 3600,) * 2)
        with pytest.raises(UserError, match="is trained by process"), run_lock(tmp_path):
            pass
        owner = json.loads((tmp_path / FILE).read_text())
        (tmp_path / FILE).write_text(json.dumps(owner | {"started": "1"}))  # another process has the number
        os.utime(tmp_path / FILE, (time.time() - 3600,) * 2)
        with run_lock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()


def test_of_many_at_once_one_has_it(tmp_path):
    """Threads have one process number, which counts as an owner that ended; so each claims another host's."""
    outcomes, barrier = [], threading.Barrier(8)

    def compete(i):
        barrier.wait()
        try:
            lock_module.take_lock(tmp_path / FILE, f"token{i}")
            outcomes.append(i)
        except lock_module.HeldError:
            pass

    threads = [threading.Thread(target=compete, args=(i,)) for i in range(8)]
    original, lock_module.is_alive = lock_module.is_alive, lambda owner, age: True
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        lock_module.is_alive = original
    assert len(outcomes) == 1
    assert json.loads((tmp_path / FILE).read_text())["token"] == f"token{outcomes[0]}"
