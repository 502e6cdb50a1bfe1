"""Local and remote files by fsspec path (DIR/x.tar, s3://bucket/x.tar, gs://...); outputs appear whole or not at all.

Local outputs are written under a temporary name in the same folder and renamed. Remote outputs are written to a
temporary local file and uploaded in one piece, which object stores show only when it is complete.
"""

import contextlib
import functools
import glob
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from oq2vl_jax.errors import UserError
from oq2vl_jax.remote.faults import PatientFile, patiently

PARTIAL = ".partial"
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs"}
"""Protocols that show an upload only when it is complete."""
READ_BYTES = 2**20


RANGE_MARK = "#bytes="
"""An input "FILE#bytes=START-STOP" is that part of a file: whole entries of an instruction file."""


def split_range(path: str) -> tuple[str, str]:
    """Splits an input into (file, "START-STOP"); the range is empty for a whole file."""
    match = re.fullmatch(f"(.*){re.escape(RANGE_MARK)}(\\d+-\\d+)", path, re.DOTALL)
    return (match[1], match[2]) if match else (path, "")


def is_remote(path: str) -> bool:
    return "://" in path


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def filesystem(path: str):
    """Returns the fsspec filesystem of a path and the path within it. Raises UserError if its package is missing."""
    import fsspec

    is_of_store = path.partition("://")[0] in OBJECT_STORES
    try:  # without a cache of listings: it would answer for other processes' files as they were
        return fsspec.core.url_to_fs(path, **({"use_listings_cache": False} if is_of_store else {}))
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: {error}.") from error


def is_object_store(fs: Any) -> bool:
    return bool(OBJECT_STORES & set(fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)))


def check_has_bucket(path: str) -> None:
    """Raises UserError if the bucket of a path in an object store is not there, or does not let us in."""
    fs, name = filesystem(path)
    with contextlib.suppress(FileNotFoundError):  # of the object; exists() of a bucket hides every other fault
        patiently(path, fs.info, f"{name.partition('/')[0]}/{PARTIAL}")


def open_input(path: str) -> BinaryIO:
    if not is_remote(path):
        if stat.S_ISFIFO(os.stat(path).st_mode):  # opening it would wait for a writer for ever
            raise UserError(f"{path} is a pipe, expected a file.")
        return open(path, "rb")
    return io.BufferedReader(PatientFile(path, *filesystem(path)), READ_BYTES)


def read_bytes(path: str) -> bytes:
    with open_input(path) as file:
        return file.read()


def is_file(path: str) -> bool:
    return exists(path) if is_remote(path) else os.path.isfile(path)


def beside(file: str, name: str) -> str:
    """Returns a name that a file mentions as a path: relative to the file's folder, absolute, or remote."""
    if is_remote(name):
        return name
    return join(file.rpartition("/")[0], name) if is_remote(file) else str(Path(file).parent / name)


def read_text(path: str) -> str:
    return read_bytes(path).decode("utf-8-sig")


def read_json(path: str) -> Any:
    """Reads a JSON file. Raises UserError if it is missing or not JSON."""
    try:
        return json.loads(read_text(path))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from error


def exists(path: str) -> bool:
    if not is_remote(path):
        return os.path.exists(path)
    fs, name = filesystem(path)
    return patiently(path, fs.exists, name)


def file_version(path: str) -> list:
    """Returns values that change when a file is replaced: size, and modification time or entity tag."""
    if not is_remote(path):
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns]
    fs, name = filesystem(path)
    info = patiently(path, fs.info, name)
    return [
        info.get("size"),
        str(info.get("ETag") or info.get("etag") or info.get("blob_id") or info.get("mtime") or info.get("created")),
    ]


def list_names(folder: str) -> set[str]:
    """Returns the names in a folder; empty if there is no folder."""
    if not is_remote(folder):
        return set(os.listdir(folder)) if os.path.isdir(folder) else set()
    fs, name = filesystem(folder)
    fs.invalidate_cache()
    try:
        found = patiently(folder, fs.ls, name, False)
    except (FileNotFoundError, NotADirectoryError):
        return set()
    return {path.rstrip("/").rsplit("/", 1)[-1] for path in found} - {""}


def check_local(option: str, path: str | None) -> None:
    """Raises UserError for a remote path of an option that takes local ones only."""
    if path and is_remote(path):
        raise UserError(f"{option} {path}: a local path is expected; copy what is written there to the bucket.")


def check_out(out: str) -> None:
    """Raises UserError for an empty --out: an unset shell variable would otherwise write into the current folder."""
    if not out.strip():
        raise UserError("--out is empty; give a folder.")


def make_folder(folder: str) -> None:
    if is_remote(folder):
        fs, name = filesystem(folder)
        if is_object_store(fs):  # it has no folders; makedirs would make a bucket, for a name that has a typing error
            check_has_bucket(folder)
        else:
            patiently(folder, functools.partial(fs.makedirs, name, exist_ok=True))
    else:
        Path(folder).mkdir(parents=True, exist_ok=True)


def remove(path: str) -> None:
    """Removes a file; it may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        if is_remote(path):
            fs, name = filesystem(path)
            patiently(path, fs.rm_file, name)
        else:
            os.remove(path)


@contextlib.contextmanager
def whole_output(path: str) -> Iterator[Path]:
    """Yields a local path to write to; `path` holds the result when the block ends, and is untouched if it fails."""
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="oq2vl_jax_") as folder:
            partial = Path(folder) / "partial"
            yield partial
            fs, name = filesystem(path)
            if is_object_store(fs):
                patiently(path, fs.put_file, str(partial), name)
            else:
                patiently(path, fs.put_file, str(partial), f"{name}{PARTIAL}")
                patiently(path, fs.mv, f"{name}{PARTIAL}", name)
        return
    partial = Path(f"{path}.{socket.gethostname()}-{os.getpid()}{PARTIAL}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str, text: str) -> None:
    with whole_output(path) as partial:
        partial.write_text(text)


def write_folder(source: Path, folder: str) -> None:
    """Copies the files of a local folder to `folder`, each whole."""
    make_folder(folder)
    for file in sorted(source.iterdir()):
        with whole_output(join(folder, file.name)) as partial:
            shutil.copyfile(file, partial)


def check_has_polars(command: str) -> None:
    """Raises UserError if the extra for parquet files (Polars) is not installed."""
    if importlib.util.find_spec("polars") is None:
        raise UserError(f"{command} needs the extra: pip install 'oq2vl-jax[filter]'.")


def expand_paths(flag: str, pattern: str) -> list[str]:
    """Expands 'DIR/{00000..00009}.tar', a glob or a path to existing files, in order. Raises UserError."""
    from braceexpand import braceexpand

    try:
        names = list(braceexpand(pattern))
    except ValueError as error:  # UnbalancedBracesError of braceexpand
        raise UserError(f"{flag} {pattern!r}: unbalanced braces.") from error
    try:
        matches = {name: _glob(name) for name in names}
    except OSError as error:  # no such bucket or data set, no permission, nobody answers
        raise UserError(f"{flag} {pattern!r}: cannot be listed: {' '.join(str(error).split())[:300]}") from error
    missing = [name for name, files in matches.items() if not files]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{flag} {pattern!r}: no file {missing[0]}{others}, of {len(names)} expected.")
    return [file for files in matches.values() for file in files]


def _glob(name: str) -> list[str]:
    if not is_remote(name):
        return sorted(glob.glob(name, recursive=True))
    fs, path = filesystem(name)
    matches = sorted(fs.unstrip_protocol(match) for match in patiently(name, fs.glob, path))
    if not matches and is_object_store(fs):  # glob hides that there is no bucket
        check_has_bucket(name)
    return matches
