"""The lock of a remote run directory, RUN_DIR/lock.json: one owner at a time, with a heartbeat.

The store makes an object only if there is none, so one of two runs gets the lock. Its age is counted on the store's own
clock. An owner that finds its lock taken over, because nothing was heard of it for two minutes, must not go on.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from oq2vl_jax import paths
from oq2vl_jax.errors import UserError
from oq2vl_jax.lock import FILE, is_alive, started
from oq2vl_jax.remote.faults import patiently, status_of

HEARTBEAT_SECONDS = 20.0
SECONDS_BETWEEN_LOOKS = 5.0
PRECONDITION_FAILED = 412
SECONDS_TO_SETTLE = 2.0
"""After a takeover: two runs that found the same dead owner both see who wrote last."""


class RemoteLock:
    """url: of the lock. is_lost: another run has taken it over."""

    def __init__(self, url: str):
        self.url, self.token, self.is_lost = url, uuid.uuid4().hex, False

    def content(self) -> bytes:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": started(os.getpid()), "token": self.token}
        return json.dumps(owner).encode()

    def check(self) -> None:
        """Raises UserError if another run has the lock."""
        if self.is_lost:
            raise UserError(f"{self.url}: another run has taken over this run directory; this one ends.")

    def beat(self) -> None:
        fs, name = paths.filesystem(self.url)
        if read_owner(self.url).get("token") == self.token:
            fs.pipe_file(name, self.content())
        else:
            self.is_lost = True


@contextlib.contextmanager
def remote_lock(run_dir: str) -> Iterator[RemoteLock]:
    """Holds the lock of a remote run directory. Raises UserError if another training holds it."""
    lock = RemoteLock(paths.join(run_dir, FILE))
    take(lock, run_dir)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(Exception):  # a store that is away for a moment
                lock.beat()

    thread = threading.Thread(target=beat, daemon=True, name="remote heartbeat")
    thread.start()
    try:
        yield lock
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception):  # of a store that is away: the lock ends by itself
            if read_owner(lock.url).get("token") == lock.token:
                paths.remove(lock.url)


def created(lock: RemoteLock) -> bool:
    """Returns whether the lock could be made; False if there is one."""
    fs, name = paths.filesystem(lock.url)

    def create() -> bool:
        try:
            fs.pipe_file(name, lock.content(), mode="create")
        except FileExistsError:
            return False
        except OSError as error:  # a store that does not say which condition failed
            if status_of(error) != PRECONDITION_FAILED:
                raise
            return False
        return True

    return patiently(lock.url, create)


def take(lock: RemoteLock, run_dir: str) -> None:
    """Takes the lock. An owner elsewhere that may be dead is watched until a heartbeat comes, or none for two minutes:
    a job that was killed and started again on another machine must not be refused."""
    is_takeover, seen = False, float("inf")
    while not created(lock):
        owner = read_owner(lock.url)
        if owner.get("token") == lock.token:  # written by a try whose answer was lost
            break
        age = age_of(lock)
        if owner.get("pid") and is_alive(owner, age):
            if (age < seen and seen < float("inf")) or owner["host"] == socket.gethostname():  # it lives
                raise UserError(
                    f"run_dir {run_dir} is trained by process {owner['pid']} on {owner['host']}, whose last sign of "
                    f"life is {age:.0f} s old; wait for it, end it, or choose another --run-dir."
                )
            if seen == float("inf"):
                who = f"process {owner['pid']} on {owner['host']}"
                print(f"run_dir {run_dir}: waiting to see whether {who} still lives", file=sys.stderr, flush=True)
            seen = age
            time.sleep(SECONDS_BETWEEN_LOOKS)
            continue
        paths.remove(lock.url)
        is_takeover = True
    if is_takeover:
        time.sleep(SECONDS_TO_SETTLE)
        lock.is_lost = read_owner(lock.url).get("token") != lock.token
        lock.check()


def read_owner(url: str) -> dict[str, Any]:
    """Returns the owner; {} if there is no lock, or one that cannot be read."""
    try:
        owner = json.loads(paths.read_text(url))
    except (FileNotFoundError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        return {}
    is_right = isinstance(owner, dict) and isinstance(owner.get("pid"), int) and isinstance(owner.get("host"), str)
    return owner if is_right else {}


def age_of(lock: RemoteLock) -> float:
    """Returns the seconds since the owner's last heartbeat, on the store's clock: a file written now is compared."""
    probe = f"{lock.url}.{lock.token}"
    fs, name = paths.filesystem(probe)
    patiently(probe, fs.pipe_file, name, b"")
    try:
        times = [patiently(url, fs.modified, paths.filesystem(url)[1]) for url in (probe, lock.url)]
    except FileNotFoundError:  # it was given back
        return float("inf")
    finally:
        paths.remove(probe)
    return max(0.0, (times[0] - times[1]).total_seconds())
