"""A remote run directory: a local folder, brought up to date before training and uploaded after every checkpoint.

    s3://bucket/run/run_id                   identity of the run; a local folder of another one is emptied
    s3://bucket/run/lock.json                one training at a time (remote/lock.py)
    s3://bucket/run/checkpoints/000500/..    _CHECKPOINT_METADATA is uploaded last and removed first: without it a
                                             checkpoint does not count
    s3://bucket/run/metrics.jsonl, ..        config, environment, samples, event files: as of the last checkpoint

Orbax writes no s3://, and a checkpoint that is written in place can be half there; so Orbax writes to the local folder,
which all processes of a run must see. A checkpoint that could not be uploaded stays there, and the same command uploads
it.
"""

import contextlib
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from oq2vl_jax import paths
from oq2vl_jax.checkpoint import ITEMS
from oq2vl_jax.checkpoint_digests import FILE as DIGESTS_FILE
from oq2vl_jax.checkpoint_digests import ITEM as DIGESTS
from oq2vl_jax.checkpoint_digests import METADATA, check_digests
from oq2vl_jax.errors import UserError
from oq2vl_jax.lock import FILE as LOCK
from oq2vl_jax.remote.cache import cache_folder, key_of
from oq2vl_jax.remote.lock import RemoteLock, remote_lock
from oq2vl_jax.remote.transfer import download_tree, list_tree, remove_tree, upload_as_they_are, upload_tree
from oq2vl_jax.remote_checkpoints import whole_steps
from oq2vl_jax.train.watchdog import ALIVE

IDENTITY = "run_id"
KEPT = ("config.json", "environment.json", "metrics.jsonl", "processes", "samples", "tensorboard")
"""Uploaded besides the checkpoints."""
SECONDS_BETWEEN_LOOKS = 0.2


def local_run_dir(run_dir: str, staging_dir: str | None = None) -> Path:
    """Returns the folder that a run writes to: run_dir, or the local folder of a remote one."""
    if not paths.is_remote(run_dir):
        return Path(run_dir)
    root = Path(staging_dir) if staging_dir is not None else cache_folder() / "runs"
    return (root / key_of(run_dir.rstrip("/"))[:16] / run_dir.rstrip("/").rsplit("/", 1)[-1]).absolute()


@contextlib.contextmanager
def opened(run_dir: str, local: Path, keep: int = 2) -> "Iterator[RemoteRunDir]":
    """Holds the lock of a remote run directory, with the local folder up to date. For the first process of a run, which
    holds the local folder's lock. keep: checkpoints that stay, the newest ones."""
    paths.make_folder(run_dir)
    with remote_lock(run_dir) as lock:
        remote = RemoteRunDir(run_dir, local, lock, keep)
        remote.pull()
        print(f"run_dir {run_dir}: written to {local}, uploaded after every checkpoint", file=sys.stderr)
        try:
            yield remote
        except BaseException as error:
            try:
                remote.close()
            except UserError as another:
                if str(another) != str(error):
                    print(f"not uploaded: {another}", file=sys.stderr)
            raise
        remote.close()


class RemoteRunDir:
    def __init__(self, url: str, local: Path, lock: RemoteLock, keep: int):
        self.url, self.local, self._lock, self._keep = url.rstrip("/"), local, lock, keep
        self._uploaded: dict[str, tuple[int, int]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._running: Future | None = None
        self._problem: UserError | None = None

    def pull(self) -> None:
        """Makes the local folder the run as it is in the bucket, or as it went on here since the last upload."""
        identity = self._read_identity()
        mine = self.local / IDENTITY
        if identity is None or not mine.is_file() or mine.read_text() != identity:
            self._set_aside()
            identity = identity or uuid.uuid4().hex
            paths.write_text(paths.join(self.url, IDENTITY), identity)
            paths.write_text(str(mine), identity)
        remote, here = whole_steps(self.url), self._whole_local_steps()
        for step in here & set(remote):
            if self._digests(step) != self._remote_digests(step):
                shutil.rmtree(self._folder(step))
        here = self._whole_local_steps()
        if not here or max(here) <= max(remote, default=-1):
            files = list_tree(self.url)
            download_tree(self.url, [name for name in files if name.split("/")[0] in KEPT], self.local)
            if remote and max(remote) not in here:
                self._download(max(remote), remote[max(remote)])

    def _set_aside(self) -> None:
        """Empties the local folder, which is of another run, but for its lock; checkpoints are put aside."""
        for path in self.local.iterdir() if self.local.is_dir() else ():
            if path.name == "checkpoints" and self._whole_local_steps():
                aside = self.local.with_name(f"{self.local.name}-before-{uuid.uuid4().hex[:8]}")
                aside.mkdir()
                path.rename(aside / "checkpoints")
                print(f"{self.local} held checkpoints of another run; they are in {aside} now", file=sys.stderr)
            elif path.is_dir() and path.name != "processes":
                shutil.rmtree(path)
            elif path.is_file() and not path.name.startswith(LOCK):
                path.unlink()
        self.local.mkdir(parents=True, exist_ok=True)

    def _read_identity(self) -> str | None:
        try:
            return paths.read_text(paths.join(self.url, IDENTITY))
        except FileNotFoundError:
            return None

    def _download(self, step: int, url: str) -> None:
        folder = self._folder(step, url.rsplit("/", 1)[-1])
        partial = self.local / f"download{paths.PARTIAL}"
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        download_tree(url, list_tree(url), partial / folder.name)
        try:
            check_digests(partial / folder.name, ITEMS)
        except UserError as error:
            raise UserError(str(error).replace(str(partial / folder.name), url)) from error
        folder.parent.mkdir(exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # half removed by a process that was killed
        (partial / folder.name).rename(folder)
        partial.rmdir()

    def after_save(self, is_saving: Callable[[], bool]) -> None:
        """Uploads, in the background, what a save leaves once `is_saving` is no longer true."""

        def upload() -> None:
            while is_saving():
                time.sleep(SECONDS_BETWEEN_LOOKS)
            self.push()

        self._running = self._pool.submit(upload)

    def problem(self) -> UserError | None:
        """Returns, when the last upload has ended, why it could not be done."""
        if self._running is None:
            return self._problem
        running, self._running = self._running, None
        try:
            running.result()
        except UserError as error:
            self._problem = error
        return self._problem

    def close(self) -> None:
        """Uploads what is left, unless the store has been waited for in vain. Raises UserError if it cannot be."""
        try:
            problem = self.problem()
            if problem is not None:
                raise problem
            self.push()
        finally:
            self._pool.shutdown()

    def push(self) -> None:
        """Uploads the whole checkpoints that are not there yet and the files that changed, then removes from the bucket
        the checkpoints that the run no longer keeps."""
        self._lock.check()
        there = whole_steps(self.url)
        here = self._whole_local_steps()
        kept = set(sorted(here | set(there))[-self._keep :])
        for step in sorted((here - set(there)) & kept):
            folder = self._folder(step)
            names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
            upload_tree(folder, [name for name in names if name != METADATA], self._remote(step))
            self._lock.check()
            upload_tree(folder, [METADATA], self._remote(step))
        changed = self._changed_files()
        upload_as_they_are(self.local, changed, self.url)
        self._uploaded |= changed
        for step in set(there) - kept:
            remove_tree(there[step], [METADATA])
            remove_tree(there[step], list_tree(there[step]))
        self._sweep()

    def _sweep(self) -> None:
        """Removes what a killed upload, or a killed removal, left of checkpoints."""
        root = paths.join(self.url, "checkpoints")
        whole = {url.rsplit("/", 1)[-1] for url in whole_steps(self.url).values()}
        for name in paths.list_names(root):
            if name.isdigit() and name not in whole:
                remove_tree(paths.join(root, name), list_tree(paths.join(root, name)))

    def _changed_files(self) -> dict[str, tuple[int, int]]:
        versions = {}
        for path in (path for name in KEPT for path in (self.local / name, *(self.local / name).rglob("*"))):
            if path.name == ALIVE or path.name.endswith(paths.PARTIAL):
                continue
            with contextlib.suppress(FileNotFoundError):  # of another process
                if path.is_file():
                    status = path.stat()
                    versions[path.relative_to(self.local).as_posix()] = (status.st_size, status.st_mtime_ns)
        return {name: version for name, version in versions.items() if self._uploaded.get(name) != version}

    def _whole_local_steps(self) -> set[int]:
        folders = (self.local / "checkpoints").glob("*")
        return {int(path.name) for path in folders if path.name.isdigit() and (path / METADATA).exists()}

    def _folder(self, step: int, name: str | None = None) -> Path:
        root = self.local / "checkpoints"
        if name is not None:
            return root / name
        return next(path for path in root.glob("*") if path.name.isdigit() and int(path.name) == step)

    def _digests(self, step: int) -> bytes:
        file = self._folder(step) / DIGESTS / DIGESTS_FILE
        return file.read_bytes() if file.is_file() else b""

    def _remote_digests(self, step: int) -> bytes:
        with contextlib.suppress(FileNotFoundError):
            return paths.read_bytes(self._remote(step, f"{DIGESTS}/{DIGESTS_FILE}"))
        return b""

    def _remote(self, step: int, name: str = "") -> str:
        folder = paths.join(paths.join(self.url, "checkpoints"), self._folder(step).name)
        return paths.join(folder, name) if name else folder
