"""Reads a packed folder, local or remote: its manifest, its files checked against the manifest, its rows by number.

The manifest names each file of rows with its size and two digests, one of both ends and one of the whole. A run
compares sizes and ends when it starts, which detects swapped, badly copied and cut off files; --data.verify full
compares every byte. ArrayRecord's own checks find a flipped bit when its row is read.
"""

import hashlib
import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

from oq2vl_jax.data.packing.local_copy import local_folder
from oq2vl_jax.data.packing.manifest import KEYS, parse_manifest
from oq2vl_jax.digests import digest_of, sample_of_file
from oq2vl_jax.errors import UserError


def read_manifest(path: str) -> dict[str, Any]:
    """Reads the manifest of a packed folder. Raises UserError if it is missing, damaged, or not of packed rows."""
    file = local_folder(path) / "manifest.json"
    if not file.is_file():
        raise UserError(f"data.sources: {path} has no manifest.json; pack it with python -m oq2vl_jax.data.pack.")
    return parse_manifest(file.read_bytes(), str(file))


def row_files(path: str, manifest: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    """Returns (file, its manifest entry) for the files that hold rows."""
    return [(local_folder(path) / entry["file"], entry) for entry in manifest["files"] if entry["rows"]]


def tokenizer_folder(path: str) -> Path:
    """Returns the folder of the tokenizer that the rows of a packed folder were made with."""
    return local_folder(path) / "tokenizer"


def check_files(path: str, is_whole: bool = False) -> None:
    """Raises UserError unless every file of rows is the one that was packed. is_whole: compares every byte."""
    for file, entry in row_files(path, read_manifest(path)):
        if not file.is_file():
            raise UserError(f"{file} is missing, which {path}/manifest.json names; pack the shards again.")
        if "sample_xxh3" not in entry:  # packed before there were digests
            continue
        size, sample = sample_of_file(file)
        if size != entry["bytes"]:
            raise UserError(f"{file} has {size} bytes, {entry['bytes']} were packed; copy it or pack the shards again.")
        if sample != entry["sample_xxh3"] or (is_whole and digest_of(file)[1] != entry["xxh3"]):
            raise UserError(
                f"{file} is not what was packed: another file, or damaged; copy it or pack the shards again."
            )


def fingerprint(sources: tuple[str, ...]) -> str:
    """Returns a digest of the packed rows behind a loader's state, because a row number is valid for these rows only.

    If the manifest has digests, it covers the content, whatever the folder's path; otherwise file names, row counts and
    settings.json.
    """
    digest = hashlib.sha256()
    for path in sources:
        manifest = read_manifest(path)
        if all("xxh3" in entry for entry in manifest["files"]):
            content: Any = [[entry["rows"], entry["xxh3"]] for entry in manifest["files"]]
            content += [manifest[key] for key in KEYS if key != "files"]
        else:
            from oq2vl_jax.jobs import read_settings

            content = [
                [(entry["file"], entry["rows"]) for entry in manifest["files"]],
                read_settings(str(local_folder(path))),
            ]
        digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()


class PackedRows:
    """The rows of a packed folder by number, as bytes; a random access source in Grain's sense."""

    def __init__(self, path: str):
        """Raises UserError for files that are not ArrayRecord, or hold more or fewer rows than the manifest says."""
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        files = row_files(path, read_manifest(path))
        self._files = [str(file) for file, _ in files]
        self._ends = list(accumulate(entry["rows"] for _, entry in files))
        try:
            self._source = ArrayRecordDataSource(self._files)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{path}: its rows cannot be read ({str(error).splitlines()[0]}); pack again.") from error
        if len(self._source) != self._ends[-1]:
            raise UserError(
                f"{path}: its files hold {len(self._source)} rows, manifest.json says {self._ends[-1]}; pack again."
            )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> bytes:
        try:
            return self._source[i]
        except (RuntimeError, ValueError) as error:
            file = bisect_right(self._ends, i)
            row = i - (self._ends[file - 1] if file else 0)
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{self._files[file]}: row {row} is damaged ({reason}); copy the file again, or pack the shards again."
            ) from error

    def __repr__(self) -> str:
        return f"PackedRows({len(self)} rows)"
