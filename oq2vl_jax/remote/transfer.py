"""Copies many files between a remote folder and this machine, several at a time, patiently."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from oq2vl_jax.errors import UserError
from oq2vl_jax.paths import filesystem, is_object_store, join
from oq2vl_jax.remote.faults import patiently
from oq2vl_jax.remote.progress import moved

AT_A_TIME = 8


def list_tree(url: str) -> dict[str, int]:
    """Returns {name within the folder: bytes} of every file below a remote folder; empty if there is none."""
    fs, root = filesystem(url)
    fs.invalidate_cache()
    try:
        found = patiently(url, lambda: fs.find(root, detail=True))
    except FileNotFoundError:
        return {}
    start = len(root.rstrip("/")) + 1
    return {name[start:]: int(entry.get("size") or 0) for name, entry in found.items() if len(name) > start}


def download_tree(url: str, names: Iterable[str], folder: Path) -> None:
    """Downloads files of a remote folder to the same places in a local one."""

    def download(name: str) -> None:
        target, remote = folder / name, join(url, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        fs, path = filesystem(remote)
        try:
            patiently(remote, fs.get_file, path, str(target))
        except FileNotFoundError as error:
            raise UserError(f"{remote}: it went away while it was copied; give the same command again.") from error
        moved()

    at_a_time(download, names)


def upload_tree(folder: Path, names: Iterable[str], url: str) -> None:
    """Uploads files of a local folder to the same places in a remote one."""

    def upload(name: str) -> None:
        remote = join(url, name)
        fs, path = filesystem(remote)
        if not is_object_store(fs):
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        patiently(remote, fs.put_file, str(folder / name), path)
        moved()

    at_a_time(upload, names)


def upload_as_they_are(folder: Path, names: Iterable[str], url: str) -> None:
    """Uploads files that may grow meanwhile, each as it is now. One that has gone is left out."""

    def upload(name: str) -> None:
        try:
            content = (folder / name).read_bytes()
        except FileNotFoundError:
            return
        remote = join(url, name)
        fs, path = filesystem(remote)
        if not is_object_store(fs):
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        patiently(remote, fs.pipe_file, path, content)
        moved()

    at_a_time(upload, names)


def remove_tree(url: str, names: Iterable[str]) -> None:
    """Removes files of a remote folder; they may be gone already."""

    def remove(name: str) -> None:
        remote = join(url, name)
        fs, path = filesystem(remote)
        try:
            patiently(remote, fs.rm_file, path)
        except FileNotFoundError:
            return

    at_a_time(remove, names)


def at_a_time(work, names: Iterable[str]) -> None:
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        list(pool.map(work, names))
