"""Ends a run that hangs with a sentence that says who waits for what, so that it can be started again.

With several processes each writes what it does to RUN_DIR/processes/N/alive.json, every BEAT_SECONDS and when it ends:

    {"host": "node7", "pid": 4711, "step": 40, "doing": "wait for data", "seconds": 3, "beat": 17, "ended": null, ..}

A process that is killed leaves the others in a collective that no answer comes to; they learn from the file, which no
longer changes, that it is gone. Stacks of all threads go to RUN_DIR/processes/N/stacks.txt.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from oq2vl_jax.errors import sentence_of
from oq2vl_jax.paths import write_text
from oq2vl_jax.remote.progress import last_moved
from oq2vl_jax.runtime import wait_for_all

ALIVE = "alive.json"
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the same command may succeed. Slurm's job files requeue on it."""
BEAT_SECONDS = 5.0
HANG_SECONDS = 1800.0
"""Of several processes, unless the configuration says otherwise. One process alone may stand in a debugger."""
SILENT_SECONDS = 60.0
"""After which a process that says nothing is taken for dead: network file systems show a change late."""
LOOK_SECONDS = 0.5


class Watchdog:
    """Watches one process of a run. seconds: how long it may do one thing; None: HANG_SECONDS with several processes,
    else as long as it takes."""

    def __init__(self, run_dir: Path, seconds: float | None, index: int = 0, count: int = 1):
        self._folder, self._index, self._count = run_dir / "processes", index, count
        self._seconds = HANG_SECONDS if seconds is None and count > 1 else seconds
        self._step, self._doing, self._since, self._is_limited = 0, "start", time.monotonic(), True
        self._beat, self._ended = 0, threading.Event()
        self._others = {i: Other(self._folder / str(i) / ALIVE) for i in range(count) if i != index}
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def start(self) -> None:
        """Begins to watch. The files of an earlier run must be gone: every process removes its own (clear), and they
        wait for each other."""
        if self._count > 1:
            self._write(None)
            self._on_abort = on_abort(lambda: self.broke("jax lost one"))
        self.doing("start")
        self._thread.start()

    def clear(self) -> None:
        if self._count > 1:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.unlink(missing_ok=True)

    def doing(self, what: str, step: int | None = None, is_limited: bool = True) -> None:
        """Notes what begins, such as "wait for data". is_limited: whether it may take no longer than `seconds`."""
        self._step, self._doing, self._since = self._step if step is None else step, what, time.monotonic()
        self._is_limited = is_limited

    def close(self, reason: str = "", code: int = 0) -> None:
        """Ends the watch. reason: why the process ends before the run does, with an exit code; the others do so too."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._count > 1:
            ctypes.CDLL(None).signal(int(signal.SIGABRT), None)  # the default
            with contextlib.suppress(OSError):
                self._write(reason, code)

    def broke(self, reason: str) -> None:
        """Ends this process after jax lost the connection to another one, with a sentence, and without jax's own end,
        which waits for the others."""
        self._ended.set()
        self._thread.join()
        gone, end = ("", EXIT_CODE), time.monotonic() + 4 * BEAT_SECONDS
        while not gone[0] and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
            gone = self._gone(2.5 * BEAT_SECONDS)
        self._end(f"the connection between the processes broke ({reason})", gone[0] or "all still live", gone[1])

    @property
    def has_others(self) -> bool:
        return self._count > 1

    @property
    def _file(self) -> Path:
        return self._folder / str(self._index) / ALIVE

    def _write(self, ended: str | None, code: int = 0) -> None:
        self._beat += 1
        now = {"host": socket.gethostname(), "pid": os.getpid(), "step": self._step, "doing": self._doing,
               "seconds": round(time.monotonic() - self._since), "beat": self._beat, "ended": ended,
               "exit_code": code}  # fmt: skip
        write_text(str(self._file), json.dumps(now))

    def _watch(self) -> None:
        next_beat = 0.0
        while not self._ended.wait(LOOK_SECONDS):
            waited = time.monotonic() - self._since
            if self._count > 1 and time.monotonic() >= next_beat:
                next_beat = time.monotonic() + BEAT_SECONDS
                with contextlib.suppress(OSError):  # a network file system that is away for a moment
                    self._write(None)
            gone, code = self._gone(SILENT_SECONDS)
            if gone:
                self._end("others are waited for in vain", gone, code)
            still = min(waited, time.monotonic() - last_moved())  # a long transfer moves on
            if self._seconds is not None and self._is_limited and still > self._seconds:
                self._end(f"nothing moved for --hang-seconds {self._seconds:g}", self._others_now(), EXIT_CODE)

    def _gone(self, silent_seconds: float) -> tuple[str, int]:
        """Returns what is known of the processes that failed or say nothing, "" if all live, and the exit code."""
        found, codes = [], []
        for index, other in self._others.items():
            other.look()
            if other.state.get("ended"):
                found.append(f"process {index} on {other.state['host']} ended: {other.state['ended']}")
                codes.append(other.state.get("exit_code") or EXIT_CODE)
            elif not other.is_done and other.silent_for() > silent_seconds:
                found.append(f"process {index}{other.place()} said nothing for {other.silent_for():.0f} s")
        return "; ".join(found), min(codes, default=EXIT_CODE)

    def _others_now(self) -> str:
        for other in self._others.values():
            other.look()
        doings = [f"process {i}{other.place()}: {other.account()}" for i, other in self._others.items()]
        return "; ".join(doings) or "it runs alone: a device, a disk or the network does not answer"

    def _end(self, what: str, why: str, code: int) -> None:
        stacks = self._folder / str(self._index) / "stacks.txt"
        waited = time.monotonic() - self._since
        where = ""
        with contextlib.suppress(OSError):
            stacks.parent.mkdir(parents=True, exist_ok=True)
            with stacks.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            where = f" Stacks: {stacks}."
            if self._count > 1:
                self._write(what, code)
        mine = f"process {self._index} of {self._count}: " if self._count > 1 else ""
        print(
            f"error: {mine}at step {self._step}, {waited:.0f} s in \"{self._doing}\", {what}; {why}. The same command "
            f"goes on from the last checkpoint.{where}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(code)


def on_abort(function: Callable[[], None]) -> Any:
    """Calls the function when this process aborts, and returns what must be kept for that.

    jax's client aborts as soon as it learns that one is lost, from a thread of its own; a handler of Python's module
    signal would wait for the main thread, which waits in a collective.
    """
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: function())
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)
    return handler


class Other:
    """What another process says of itself."""

    def __init__(self, file: Path):
        self._file, self.state, self._changed = file, {}, time.monotonic()

    def look(self) -> None:
        try:
            state: dict[str, Any] = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return
        if isinstance(state, dict) and state != self.state:
            self.state, self._changed = state, time.monotonic()

    @property
    def is_done(self) -> bool:
        return self.state.get("ended") == ""

    def silent_for(self) -> float:
        return time.monotonic() - self._changed

    def place(self) -> str:
        return f" (pid {self.state['pid']} on {self.state['host']})" if self.state else ""

    def account(self) -> str:
        if not self.state:
            return "it never began"
        return f'step {self.state["step"]}, {self.state["seconds"]} s in "{self.state["doing"]}"'


@contextlib.contextmanager
def watched(watchdog: Watchdog) -> Iterator[None]:
    """Watches while the block runs, and tells the other processes if it fails."""
    watchdog.clear()
    wait_for_all("watchdog")
    watchdog.start()
    try:
        yield
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is not None:
            watchdog.close(sentence, code=2)
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if watchdog.has_others and isinstance(error, jax.errors.JaxRuntimeError):  # of a collective
            watchdog.broke(reason)
        watchdog.close(reason, code=1)
        raise
    except BaseException as error:  # Ctrl-C; whoever called may go on, and must not be ended later
        watchdog.close(type(error).__name__, code=EXIT_CODE)
        raise
    watchdog.close()
