"""A folder of this machine for copies of remote files, shared by its processes: bounded, and safe when several fill it.

    CACHE/files/KEY         a file of packed rows; KEY is its digest, so a copy in another bucket is the same file
    CACHE/folders/KEY/      a packed folder (its manifest and tokenizer, and links into files/), or a checkpoint
    CACHE/leases/TOKEN      what a process uses; nothing of it is removed while that process lives (lock.py)

Everything appears whole or not at all. To make room, what was used least recently and nobody uses goes first.
"""

import atexit
import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from oq2vl_jax.errors import UserError
from oq2vl_jax.lock import HeldError, age_of, file_lock, is_alive, read_owner
from oq2vl_jax.paths import PARTIAL, filesystem
from oq2vl_jax.remote.faults import patiently
from oq2vl_jax.remote.progress import moved

FOLDER_VARIABLE, GIB_VARIABLE = "OQ2VL_JAX_CACHE", "OQ2VL_JAX_CACHE_GIB"
DEFAULT_FOLDER = "~/.cache/oq2vl_jax"
FREE_SHARE = 0.02
"""Of the disk, left free."""
DOWNLOADS = 8
"""Files at a time, of one process."""
SECONDS_BETWEEN_LINES = 10.0


class Wanted(NamedTuple):
    """A file to be there. check: raises UserError if the copy (its local path) is not the file."""

    key: str
    url: str
    num_bytes: int
    check: Callable[[Path], None] | None = None


class Cache:
    """A cache folder. max_bytes: None leaves FREE_SHARE of the disk."""

    def __init__(self, folder: Path, max_bytes: int | None = None):
        self.folder, self._max_bytes = folder.absolute(), max_bytes
        self._leased: dict[str, int] = {}
        self._open, self._lease = contextlib.ExitStack(), ""
        for name in ("files", "folders", "leases"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def files(self, wanted: list[Wanted]) -> dict[str, Path]:
        """Returns {key: local file}, after it has fetched those that are not there; they stay while this process lives.

        Raises UserError if they do not fit, or if one cannot be read or is not what it should be.
        """
        paths = {one.key: self.folder / "files" / one.key for one in wanted}
        missing = self._reserve({f"files/{one.key}": one.num_bytes for one in wanted})
        pending = [one for one in wanted if f"files/{one.key}" in missing]
        if pending:
            fetch_files(pending, paths)
        for path in paths.values():
            touch(path)
        return paths

    def place(self, key: str, num_bytes: int, fill: Callable[[Path], None]) -> Path:
        """Returns the folder of a key; `fill` writes it to a temporary folder first if it is not there."""
        path = self.folder / "folders" / key
        self._reserve({f"folders/{key}": num_bytes})
        with waiting_lock(self.folder / "folders" / f"{key}.lock"):
            if not path.is_dir():
                partial_folder = path.with_name(f"{key}{PARTIAL}")
                shutil.rmtree(partial_folder, ignore_errors=True)  # of a process that was killed
                partial_folder.mkdir()
                fill(partial_folder)
                partial_folder.rename(path)
        touch(path)
        return path

    def _reserve(self, sizes: dict[str, int]) -> set[str]:
        """Leases entries, {name: bytes}, and makes room for those that are not there; returns the names of these."""
        with waiting_lock(self.folder / "cache.lock"):
            self._take_lease(sizes)
            missing = {name for name in sizes if not (self.folder / name).exists()}
            self._make_room(sum(sizes[name] for name in missing))
        return missing

    def _take_lease(self, sizes: dict[str, int]) -> None:
        if not self._lease:
            self._lease = uuid.uuid4().hex
            self._open.enter_context(file_lock(self.folder / "leases" / self._lease))
            self._open.callback((self.folder / "leases" / f"{self._lease}.json").unlink, missing_ok=True)
            atexit.register(self._open.close)
        self._leased |= sizes
        listed = self.folder / "leases" / f"{self._lease}.json"
        partial_list = listed.with_suffix(PARTIAL)
        partial_list.write_text(json.dumps(self._leased))
        partial_list.replace(listed)

    def _make_room(self, num_bytes: int) -> None:
        """Removes what nobody uses until num_bytes fit. Raises UserError if they do not fit even then."""
        if not num_bytes:
            return
        used = {name: bytes_of(self.folder / name) for name in self._names()}
        in_use = self._in_use()
        coming = {name: size for name, size in in_use.items() if name not in used and name not in self._leased}
        excess = self._excess(sum(used.values()), num_bytes + sum(coming.values()))
        oldest = sorted(used, key=lambda name: modified(self.folder / name))
        for name in oldest:
            if excess <= 0:
                return
            if name.removesuffix(PARTIAL) not in in_use:
                remove_entry(self.folder / name)
                excess -= used[name]
        if excess > 0:
            bound = "the disk holds" if self._max_bytes is None else f"of {self._max_bytes / 2**30:.2f} GiB it may hold"
            raise UserError(
                f"the cache {self.folder} needs {num_bytes / 2**30:.2f} GiB more, {excess / 2**30:.2f} GiB more than "
                f"{bound}, and runs use the rest. Every file of packed rows is read all the time, because rows are "
                f"shuffled over all of them: give a larger --data.cache-gib or another --data.cache-dir."
            )

    def _excess(self, used: int, num_bytes: int) -> int:
        """Returns how many bytes must go before num_bytes can come."""
        if self._max_bytes is not None:
            return used + num_bytes - self._max_bytes
        disk = shutil.disk_usage(self.folder)
        return int(num_bytes - disk.free + FREE_SHARE * disk.total)

    def _names(self) -> list[str]:
        return [
            f"{kind}/{path.name}"
            for kind in ("files", "folders")
            for path in (self.folder / kind).iterdir()
            if not path.name.endswith(".lock") and ".lock." not in path.name
        ]

    def _in_use(self) -> dict[str, int]:
        """Returns the entries that living processes lease, with their bytes; removes the leases of dead ones."""
        names: dict[str, int] = {}
        for listed in (self.folder / "leases").glob("*.json"):
            lease = listed.with_suffix("")
            owner, age = read_owner(lease), age_of(lease)
            is_of_this_process = owner is not None and owner["pid"] == os.getpid()
            if not is_of_this_process and (owner is None or age is None or not is_alive(owner, age)):
                remove_entry(listed)
                remove_entry(lease)
                continue
            with contextlib.suppress(OSError, ValueError):
                names |= json.loads(listed.read_text())
        return names


def fetch_files(wanted: list[Wanted], paths: dict[str, Path]) -> None:
    """Fetches files, several at a time; one that another process is fetching is left to that process."""
    progress = Progress(len(wanted), sum(one.num_bytes for one in wanted))
    pending = wanted
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        while pending:
            done = list(pool.map(lambda one: fetch_file(one, paths[one.key], progress), pending))
            pending = [one for one, is_there in zip(pending, done, strict=True) if not is_there]
            if pending:
                time.sleep(0.5)


def fetch_file(wanted: Wanted, target: Path, progress: "Progress") -> bool:
    """Returns whether the file is there; False while another process fetches it."""
    if target.exists():
        progress.add(wanted.num_bytes)
        return True
    try:
        with file_lock(target.with_name(f"{target.name}.lock")):
            if not target.exists():
                download(wanted, target)
    except HeldError:
        return False
    progress.add(wanted.num_bytes)
    moved()
    return True


def download(wanted: Wanted, target: Path) -> None:
    partial_file = target.with_name(f"{target.name}{PARTIAL}")
    fs, name = filesystem(wanted.url)
    try:
        patiently(wanted.url, fs.get_file, name, str(partial_file))
    except FileNotFoundError as error:
        raise UserError(f"{wanted.url}: no such file.") from error
    if wanted.check is not None:
        wanted.check(partial_file)
    partial_file.replace(target)


class Progress:
    """A line on stderr every ten seconds of a download."""

    def __init__(self, num_files: int, num_bytes: int):
        self._files, self._bytes = [0, num_files], [0, num_bytes]
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def add(self, num_bytes: int) -> None:
        self._files[0] += 1
        self._bytes[0] += num_bytes
        if time.monotonic() >= self._next_line and self._files[0] < self._files[1]:
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            done, total = (number / 2**30 for number in self._bytes)
            print(f"fetched {self._files[0]} of {self._files[1]} files, {done:.2f} of {total:.2f} GiB", file=sys.stderr,
                  flush=True)  # fmt: skip


@contextlib.contextmanager
def waiting_lock(file: Path) -> Iterator[None]:
    """Holds a lock, waiting for it as long as its owner lives."""
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(file_lock(file))
                break
            except HeldError:
                time.sleep(0.2)
        yield


def bytes_of(path: Path) -> int:
    """Returns the bytes of a file, or of the files in a folder; links count nothing."""
    try:
        if path.is_dir():
            return sum(p.lstat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def touch(path: Path) -> None:
    with contextlib.suppress(OSError):  # of another user, who shares the cache
        os.utime(path)


def remove_entry(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def key_of(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


_CACHES: dict[tuple[Path, int | None], Cache] = {}


def use(folder: str | None, gib: float | None) -> None:
    """Sets the cache of this process and of those it starts; None keeps the default."""
    if folder is not None:
        os.environ[FOLDER_VARIABLE] = folder
    if gib is not None:
        os.environ[GIB_VARIABLE] = str(gib)


def cache_folder() -> Path:
    return Path(os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER).expanduser()


def the_cache() -> Cache:
    """Returns the cache that --data.cache-dir or the environment names."""
    gib = os.environ.get(GIB_VARIABLE)
    try:
        max_bytes = int(float(gib) * 2**30) if gib else None
    except (ValueError, OverflowError) as error:
        raise UserError(f"{GIB_VARIABLE} = {gib!r}, expected GiB.") from error
    chosen = cache_folder().absolute(), max_bytes
    if chosen not in _CACHES:
        _CACHES[chosen] = Cache(*chosen)
    return _CACHES[chosen]
