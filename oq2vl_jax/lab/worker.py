"""Runs the cells of an ablation: takes one that nobody has, runs its stages and tasks, until all have ended.

Any number of workers share a folder. A cell is claimed by a lock with a heartbeat (DIR/claims); the claim of a dead
worker is taken over, and its cell goes on from its checkpoints. Every stage is a process of its own: one that fails or
is killed fails its cell, and the others go on.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from oq2vl_jax.config_files import to_json
from oq2vl_jax.errors import UserError
from oq2vl_jax.lab.cells import (
    Cell,
    all_cells,
    results_folder,
    run_folder,
    stage_config,
    status_of,
    write_status,
)
from oq2vl_jax.lab.definition import Task
from oq2vl_jax.lab.plan import Plan
from oq2vl_jax.lab.results import unusable
from oq2vl_jax.lab.runs import has_ended
from oq2vl_jax.lock import HeldError, file_lock
from oq2vl_jax.paths import read_json, write_text

POLL_SECONDS = 2.0
PREPARED = "prepared.json"
TAIL_LINES = 12
STOPPED = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)


class StoppedError(Exception):
    """The worker was asked to stop (SIGTERM); its cell goes on with the next one."""


class CommandError(Exception):
    """A command of a cell failed; the message is why."""


class Worker(NamedTuple):
    """rank: where among the open cells this worker begins, of world_size."""

    out: str
    rank: int = 0
    world_size: int = 1
    say: Callable[[str], None] = print


def prepare(commands: tuple[str, ...], out: str) -> None:
    """Runs the commands that make the data, each once over all workers. Raises UserError if one fails."""
    while still_to_prepare(commands, out):
        try:
            with claim(out, "prepare"):
                for command in still_to_prepare(commands, out):
                    print(f"prepare: {command}", flush=True)
                    prepare_one(command)
                    done = [one for one in commands if one not in still_to_prepare(commands, out)]
                    write_text(str(Path(out) / PREPARED), json.dumps([*done, command], indent=1) + "\n")
        except HeldError:
            time.sleep(POLL_SECONDS)


def still_to_prepare(commands: tuple[str, ...], out: str) -> list[str]:
    file = Path(out) / PREPARED
    done = read_json(str(file)) if file.is_file() else []
    return [command for command in commands if command not in done]


def prepare_one(command: str) -> None:
    words = shlex.split(command)
    words[0] = sys.executable if words[0] in ("python", "python3") else words[0]
    try:
        code = subprocess.run(words).returncode
    except OSError as error:
        raise UserError(f"prepare: {command!r}: {error.strerror}.") from error
    if code:
        raise UserError(f"prepare: {command!r} failed; its message is above.")


@contextmanager
def claim(out: str, name: str) -> Iterator[None]:
    """Holds the claim of a name. Raises HeldError if another worker does."""
    folder = Path(out) / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder / f"{name.replace('/', '-')}.json"):
        yield


def work(plan: Plan, worker: Worker) -> None:
    """Runs cells until all of them have ended, waiting for those of other workers, whose claims may become free."""
    with stop_on_sigterm():
        while True:
            open_cells = [cell for cell in all_cells(plan, worker.out) if is_open(worker.out, cell)]
            if not open_cells:
                return
            first = worker.rank * len(open_cells) // worker.world_size
            if not any(run_if_free(plan, cell, worker) for cell in [*open_cells[first:], *open_cells[:first]]):
                time.sleep(POLL_SECONDS)


def is_open(out: str, cell: Cell) -> bool:
    return status_of(out, cell)["status"] == "open"


def run_if_free(plan: Plan, cell: Cell, worker: Worker) -> bool:
    """Runs a cell unless another worker has it or has ended it. Returns whether it ran."""
    try:
        with claim(worker.out, cell.name):
            if not is_open(worker.out, cell):
                return False
            run_cell(plan, cell, worker)
            return True
    except HeldError:
        return False


def run_cell(plan: Plan, cell: Cell, worker: Worker) -> None:
    """Runs what is left of a cell, and writes how it ended. Raises StoppedError on SIGTERM."""
    folder = run_folder(worker.out, cell)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    try:
        for stage in cell.stages:
            run_stage(cell, stage, worker.out)
        for task in plan.ablation.tasks:
            run_task(cell, task, worker.out)
        problem = unusable(plan, worker.out, cell)
        if problem is not None:
            raise CommandError(problem)
    except CommandError as error:
        write_status(worker.out, cell, "failed", why=str(error))
        worker.say(f"{cell}: failed: {error}")
        return
    write_status(worker.out, cell, "done")
    cells = all_cells(plan, worker.out)
    ended = sum(not is_open(worker.out, one) for one in cells)
    worker.say(f"{cell}: done in {time.monotonic() - start:.0f} s ({ended} of {len(cells)})")


def run_stage(cell: Cell, stage: str, out: str) -> None:
    run_dir = run_folder(out, cell) / stage
    if has_ended(run_dir):
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    config = run_dir.with_suffix(".json")
    write_text(str(config), to_json(stage_config(cell, stage, out)))
    run_child(f"stage {stage}", out, cell, ["oq2vl_jax.train", str(config)], run_dir.with_suffix(".log"))
    if not has_ended(run_dir):
        raise StoppedError  # SIGTERM reached the run alone: its checkpoint is saved


def run_task(cell: Cell, task: Task, out: str) -> None:
    folder = results_folder(out, cell)
    file = folder / "results.json"
    if file.is_file() and task.name in read_json(str(file)):
        return
    folder.mkdir(parents=True, exist_ok=True)
    last = run_folder(out, cell) / list(cell.stages)[-1]
    words = [
        "oq2vl_jax.eval", "--checkpoint", str(last), "--tasks", task.name, "--data", task.data, "--out", str(folder),
        "--method", task.method, "--profile", task.profile, "--weights", task.weights,
        *(["--limit", str(task.limit)] if task.limit else []),
    ]  # fmt: skip
    run_child(f"task {task.name}", out, cell, words, folder / f"{task.name}.log")


def run_child(what: str, out: str, cell: Cell, words: list[str], log: Path) -> None:
    """Runs a module as a process of its own, with its output in a log. Raises CommandError if it fails."""
    lock = run_folder(out, cell) / "child.json"
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str((Path(out) / "compilation_cache").absolute())}
    with log.open("a") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "oq2vl_jax.lab.child", str(lock), *words],
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
        try:
            code = child.wait()
        except BaseException:  # Ctrl-C, SIGTERM: the child saves and stops
            child.send_signal(signal.SIGTERM)
            child.wait()
            raise
    if code in STOPPED:
        raise StoppedError  # the signal reached the child as well
    if code:
        raise CommandError(f"{what}: {reason_of(code, log)}")


def reason_of(code: int, log: Path) -> str:
    """Returns why a command failed: its sentence, or the signal that ended it, or its last line."""
    if code < 0:
        hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
        return f"ended by {signal.Signals(-code).name}{hint}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-TAIL_LINES:]
    sentences = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return sentences[-1] if sentences else f"exit {code}: {lines[-1] if lines else 'no output'}"


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise StoppedError

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
