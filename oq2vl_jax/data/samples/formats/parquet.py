"""Parquet files with the pictures inside, one row a sample, as most data sets of the hub have them.

    image | images                      a struct of bytes and path, bytes, a path under --images; or a list of them
    conversations | messages | texts    a conversation in one of the forms of data/samples/chats.py
    caption | text | ...                or one column of text: a caption

The columns are found by the schema and said in one line. An input is a row group; rows are read a few at a time, so
memory is bounded by the largest row group, compressed.
"""

import functools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from oq2vl_jax import paths
from oq2vl_jax.data.samples.chats import TALKS
from oq2vl_jax.data.samples.formats.format import Format
from oq2vl_jax.data.samples.ids import uid_of_key
from oq2vl_jax.data.samples.images import ImageError
from oq2vl_jax.data.samples.pictures import picture_in_folder, with_pictures
from oq2vl_jax.data.samples.shards import Sample, printable
from oq2vl_jax.errors import UserError

ROWS_AT_ONCE = 64
IMAGES = ("images", "image", "jpg", "png", "webp")
CAPTIONS = ("caption", "text", "txt", "captions")
KEYS = ("id", "key", "__key__", "uid", "index")


class Columns(NamedTuple):
    """Names of the columns that samples are made of; None for one that the file does not have."""

    images: str | None
    talk: str | None
    caption: str | None
    key: str | None


def find_columns(path: str, names: list[str]) -> Columns:
    """Returns the columns of a file. Raises UserError with its columns if they make no sample."""

    def first(candidates: tuple[str, ...]) -> str | None:
        return next((name for name in candidates if name in names), None)

    columns = Columns(first(IMAGES), first(TALKS), first(CAPTIONS), first(KEYS))
    if columns.talk is None and (columns.caption is None or columns.images is None):
        raise UserError(
            f"{path}: its columns are {', '.join(names)}; expected {', '.join(TALKS[:-1])} or {TALKS[-1]}, or one of "
            f"{', '.join(CAPTIONS)} beside one of {', '.join(IMAGES)}."
        )
    return columns


@functools.lru_cache(maxsize=1)
def describe(path: str) -> Columns:
    """Finds the columns of a file and says once how it is read."""
    columns = find_columns(path, open_parquet(path).schema_arrow.names)
    text = columns.talk or columns.caption
    print(f"{path}: pictures from {columns.images or 'none'}, text from {text}", file=sys.stderr)
    return columns


def open_parquet(path: str) -> Any:
    """Opens a file. Raises UserError if it is no parquet file, or if pyarrow is missing."""
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise UserError("parquet files need pyarrow: pip install 'oq2vl-jax[parquet]'.") from error
    try:
        return parquet.ParquetFile(paths.open_input(path))
    except ArrowInvalid as error:
        raise UserError(f"{path}: no whole parquet file: {str(error).splitlines()[0]}") from error


def split(path: str, samples_per_input: int) -> list[str]:
    """Splits a file into its row groups."""
    del samples_per_input
    return [f"{path}{paths.RANGE_MARK}{i}-{i}" for i in range(open_parquet(path).num_row_groups)]


def read(path: str, images: str | None) -> Iterator[Sample]:
    """Yields the samples of a row group, or of a whole file."""
    file, span = paths.split_range(path)
    columns, source = describe(file), open_parquet(file)
    groups = [int(span.split("-")[0])] if span else list(range(source.num_row_groups))
    names = [name for name in columns if name is not None]
    for group in groups:
        number = sum(source.metadata.row_group(i).num_rows for i in range(group))
        for batch in batches(source, group, names, file):
            for row in batch.to_pylist():
                yield sample_of(row, columns, f"{file.rsplit('/', 1)[-1]}#{number}", images)
                number += 1


def sample_of(row: dict[str, Any], columns: Columns, default_key: str, images: str | None) -> Sample:
    """Returns the sample of a row. A problem is stored in it, not raised."""
    key = row.get(columns.key) if columns.key else None
    key = default_key if key is None else printable(str(key))
    talk, caption, pictures = (row[name] if name else None for name in (columns.talk, columns.caption, columns.images))
    sample = Sample(key, [], uid=uid_of_key(key))
    if talk is not None:
        sample = sample._replace(conversations=talk)
    elif isinstance(caption, str):
        sample = sample._replace(text=caption)
    else:
        return sample._replace(problem="text_missing")
    cells = cells_of(pictures)
    return with_pictures(sample, lambda: cells, lambda cell: picture_of(cell, images, key))


def cells_of(value: Any) -> list[Any]:
    """Returns the pictures of a row; an empty cell means text alone."""
    if value is None or value == "" or value == b"":
        return []
    return list(value) if isinstance(value, list) else [value]


def picture_of(cell: Any, images: str | None, key: str) -> tuple[bytes, list[str]]:
    """Returns the contents of a picture: bytes, a struct of bytes and path, or a path under --images."""
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, bytes):
        return cell, []
    if isinstance(cell, str) and cell:
        return picture_in_folder(cell, images, key)
    raise ImageError("image_missing" if cell is None else "image_invalid", f"a picture is {type(cell).__name__}")


def batches(source: Any, group: int, names: list[str], file: str) -> Iterator[Any]:
    """Yields the rows of a row group a few at a time. Raises UserError for a damaged one."""
    from pyarrow import ArrowException

    try:
        yield from source.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=names)
    except (ArrowException, OSError) as error:
        raise UserError(f"{file}: row group {group} cannot be read ({str(error).splitlines()[0]}).") from error


FORMAT = Format(
    matches=lambda path: paths.split_range(path)[0].endswith(".parquet"),
    read=read,
    split=split,
)
