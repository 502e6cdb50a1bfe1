"""Reads benchmark files as their projects distribute them: Hugging Face parquet and VLMEvalKit TSV. Local files only.

An image in parquet is a struct {"bytes", "path"}, plain bytes, or a list of either. An image in a TSV is base64, a list
of base64 written as Python, or, if it has at most 64 characters, the index of the row that holds the image.
"""

import ast
import base64
import binascii
import csv
import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from oq2vl_jax.data.samples.parquet import reading_parquet
from oq2vl_jax.errors import UserError
from oq2vl_jax.paths import check_has_polars, is_remote
from oq2vl_jax.remote.folders import local_copy

MAX_REFERENCE_CHARACTERS = 64
"""An image cell of a TSV up to this length is the index of the row that holds the image (VLMEvalKit's rule)."""
HASH_BLOCK_BYTES = 2**20


class Table(NamedTuple):
    """The rows of a benchmark's files, in order. is_tsv: VLMEvalKit's columns, else Hugging Face's."""

    rows: list[dict[str, Any]]
    is_tsv: bool
    files: list[Path]


def find_files(data: str, task: str, patterns: Iterable[str]) -> list[Path]:
    """Returns the files of the first pattern with a match below --data. Raises UserError naming the patterns."""
    root = local_copy(data) if is_remote(data) else Path(data)
    if not root.is_dir():
        raise UserError(f"--data {data}: no such folder.")
    for pattern in patterns:
        matches = sorted(path for path in root.rglob(pattern) if path.is_file())
        if matches:
            return matches
    raise UserError(f"--data {data}: no file of {task} here; looked for {', '.join(patterns)}.")


def read_table(task: str, files: list[Path]) -> Table:
    """Reads files into one table. Raises UserError if they are damaged, empty, or a mix of TSV and parquet."""
    is_tsv = files[0].suffix == ".tsv"
    rows = []
    for file in files:
        rows += read_tsv(file) if is_tsv else read_parquet(file)
    if not rows:
        raise UserError(f"{task}: {files[0]} has no rows.")
    return Table(resolve_references(rows) if is_tsv else rows, is_tsv, files)


def check_columns(task: str, table: Table, expected: Iterable[str]) -> None:
    """Raises UserError naming every missing column and the columns found."""
    present = set().union(*(row.keys() for row in table.rows))
    missing = [name for name in expected if name not in present]
    if missing:
        raise UserError(
            f"{table.files[0]}: column {', '.join(missing)} is missing for {task}; "
            f"expected {', '.join(expected)}, found {', '.join(sorted(present))}."
        )


def read_parquet(path: Path) -> list[dict[str, Any]]:
    check_has_polars("oq2vl_jax.eval")
    import polars as pl

    with reading_parquet(str(path)):
        return pl.read_parquet(path).to_dicts()


def read_tsv(path: Path) -> list[dict[str, Any]]:
    """Reads a TSV. Every cell is text; an empty cell is None. Raises UserError."""
    csv.field_size_limit(sys.maxsize)
    with path.open("rb") as tail:
        tail.seek(max(0, path.stat().st_size - 1))
        if tail.read() not in (b"\n", b""):
            raise UserError(f"{path}: it does not end in a line break; fetch it again if it is cut off, or add one.")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable TSV: {error}.") from error
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise UserError(
                f"{path}: record {number - 1} has another number of cells than the header; fetch the file again."
            )
    return [{name: cell or None for name, cell in row.items()} for row in rows]


def resolve_references(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replaces every image cell that is the index of another row by that row's image. Raises UserError."""
    if "image" not in rows[0]:
        return rows
    image_of = {str(row.get("index")): row["image"] for row in rows}
    resolved = []
    for row in rows:
        image = row["image"]
        if image is not None and len(image) <= MAX_REFERENCE_CHARACTERS:
            image = image_of.get(image)
            if image is None or len(image) <= MAX_REFERENCE_CHARACTERS:
                raise UserError(f"row {row.get('index')}: its image is that of row {row['image']}, which holds none.")
        resolved.append({**row, "image": image})
    return resolved


def images_of(value: Any) -> list[bytes]:
    """Returns the encoded images of a cell, in either format. Invalid base64 becomes b"", which does not decode."""
    if value is None:
        return []
    if isinstance(value, bytes):
        return [value]
    if isinstance(value, dict):
        return [value.get("bytes") or b""]
    if isinstance(value, list):
        return [image for item in value for image in images_of(item)]
    if value.startswith("[") and value.endswith("]"):
        return [image for item in literal_list(value) for image in images_of(item)]
    try:
        return [base64.b64decode(value, validate=True)]
    except (binascii.Error, ValueError):
        return [b""]


def literal_list(text: Any) -> list:
    """Returns a list as it is and parses a list written as Python; any other value becomes a list of one."""
    if isinstance(text, list):
        return text
    if isinstance(text, str) and text.startswith("[") and text.endswith("]"):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [text]
        return list(value)
    return [text]


def is_given(cell: Any) -> bool:
    """Returns False for a missing value: null, NaN, an empty text or the text "nan"."""
    return cell is not None and cell == cell and str(cell).strip() not in ("", "nan")


def sha256_of(files: list[Path]) -> str:
    """Hashes the contents of all files, in order."""
    digest = hashlib.sha256()
    for file in files:
        for block in blocks(file):
            digest.update(block)
    return digest.hexdigest()


def blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while block := stream.read(HASH_BLOCK_BYTES):
            yield block
