"""Locks with a heartbeat: one owner at a time of a run directory (RUN_DIR/lock.json), or of a cell of an ablation.

    {"host": "node7", "pid": 4711, "token": "9f0c.."}     its modification time is the owner's heartbeat

A lock of a dead owner is taken over: one whose process has gone (checked on the same host only), or one that has missed
HEARTBEATS_MISSED heartbeats.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oq2vl_jax.errors import UserError

FILE = "lock.json"
HEARTBEAT_SECONDS = 10.0
HEARTBEATS_MISSED = 12
"""Large, because a network file system may show a heartbeat late."""


class HeldError(Exception):
    """Somebody alive holds the lock. age: seconds since the last sign of life."""

    def __init__(self, owner: dict[str, Any], age: float):
        super().__init__(f"held by process {owner['pid']} on {owner['host']}")
        self.owner, self.age = owner, age


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Holds the lock of a run directory. Raises UserError if another training holds it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(run_dir / FILE))
        except HeldError as error:
            raise UserError(
                f"run_dir {run_dir} is trained by process {error.owner['pid']} on {error.owner['host']}, whose last "
                f"sign of life is {error.age:.0f} s old; wait for it, end it, or choose another --run-dir."
            ) from None
        yield


@contextlib.contextmanager
def file_lock(file: Path) -> Iterator[None]:
    """Holds a lock, a file in a folder that exists. Raises HeldError if another process does."""
    token = uuid.uuid4().hex
    take_lock(file, token)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a network file system that is away for a moment
                if (read_owner(file) or {}).get("token") == token:
                    os.utime(file)

    thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if (read_owner(file) or {}).get("token") == token:
            file.unlink(missing_ok=True)


def take_lock(file: Path, token: str) -> None:
    """Creates the lock, after removing a dead owner's. If two processes try at once, one finds the other's lock."""
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": started(os.getpid()), "token": token}
    content = json.dumps(owner)
    prepared = file.with_name(f"{file.name}.{token}")
    prepared.write_text(content)
    try:
        while True:
            try:
                os.link(prepared, file)  # atomic: fails if there is a lock; readers see it complete
                return
            except FileExistsError:
                owner = read_owner(file)
                age = age_of(file)
                if owner is not None and age is not None and is_alive(owner, age):
                    raise HeldError(owner, age) from None
                remove_lock(file, owner, prepared.with_suffix(".dead"))
    finally:
        prepared.unlink(missing_ok=True)


def remove_lock(file: Path, owner: dict[str, Any] | None, aside: Path) -> None:
    """Removes a dead owner's lock; restores it if another process has taken it over in the meantime."""
    try:
        file.rename(aside)
    except FileNotFoundError:
        return
    if read_owner(aside) != owner:
        with contextlib.suppress(FileExistsError):
            os.link(aside, file)
    aside.unlink(missing_ok=True)


def read_owner(file: Path) -> dict[str, Any] | None:
    """Returns the owner; None if there is no lock, or one that cannot be read and so has no owner."""
    try:
        owner = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    is_right = isinstance(owner, dict) and isinstance(owner.get("pid"), int) and isinstance(owner.get("host"), str)
    return owner if is_right else None


def started(pid: int) -> str | None:
    """Returns when a process of this machine started, in ticks since it booted; None where that is not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def age_of(file: Path) -> float | None:
    """Returns the seconds since the last heartbeat; None if the lock has gone."""
    try:
        return max(0.0, time.time() - file.stat().st_mtime)
    except FileNotFoundError:
        return None


def is_alive(owner: dict[str, Any], age: float) -> bool:
    if owner["host"] != socket.gethostname():
        return age < HEARTBEATS_MISSED * HEARTBEAT_SECONDS
    if owner["pid"] == os.getpid():  # left by a restarted container, or by an earlier run in this process
        return False
    try:
        os.kill(owner["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    if owner.get("started") is not None and owner["started"] == started(owner["pid"]):
        return True  # the same process, however long it slept
    return age < HEARTBEATS_MISSED * HEARTBEAT_SECONDS  # else another process now has the pid
