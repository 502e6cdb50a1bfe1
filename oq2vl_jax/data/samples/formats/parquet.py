"""Parquet files with the pictures inside, one row a sample, as most data sets of the hub have them.

    image | images                          a struct of bytes and path, bytes, a path under --images; or a list of them
    conversations | messages | texts        a conversation in one of the forms of data/samples/chats.py
    texts beside images                     a document: strings and pictures in order (OBELICS)
    text_list beside image_info             a document: pictures say before which text they stand (MMC4)
    caption | text | ...                    or one column of text: a caption

The columns are found by the schema (data/samples/columns.py) and said in one line. An input is a row group; rows are
read a few at a time, so memory is bounded by the largest row group, compressed.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from oq2vl_jax import paths
from oq2vl_jax.data.samples.chats import picture_of_url
from oq2vl_jax.data.samples.columns import Columns, find_columns, talk_of
from oq2vl_jax.data.samples.formats.format import Format, Reading
from oq2vl_jax.data.samples.ids import key_of_row, parse_uid, uid_of_text
from oq2vl_jax.data.samples.images import ImageError, decode_base64, larger_than_a_pixel
from oq2vl_jax.data.samples.pictures import picture_in_folder, with_pictures
from oq2vl_jax.data.samples.shards import Sample, interleaved, printable
from oq2vl_jax.errors import UserError

ROWS_AT_ONCE = 64
STREAM_BYTES = 2**20
"""A column is read in blocks of so many bytes; otherwise pyarrow reads a column of a row group whole."""
MAX_INDEXED_BYTES = 256 * 2**20
"""Largest row group, uncompressed, that is read at random while training: every sample may need another one."""
KEPT_GROUPS = 4
"""Row groups that stay in memory while samples are read at random."""


@functools.lru_cache(maxsize=64)
def columns_of(path: str, told: tuple[str, ...]) -> Columns:
    return find_columns(path, open_parquet(path).schema_arrow, told)


def check(path: str, reading: Reading) -> None:
    """Says how a file is read. Raises UserError if its columns make no sample."""
    columns = columns_of(path, reading.columns)
    print(f"{path}: pictures from {columns.image or 'none'}, {columns.kind}s from {columns.text}", file=sys.stderr)


def open_parquet(path: str) -> Any:
    """Opens a file. Raises UserError if it is no parquet file, or if pyarrow is missing."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError("parquet files need pyarrow: pip install 'oq2vl-jax[parquet]'.") from error
    try:
        return parquet.ParquetFile(paths.open_input(path), buffer_size=STREAM_BYTES)
    except (ArrowException, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: no whole parquet file: {str(error).splitlines()[0]}") from error


def split(path: str, samples_per_input: int) -> list[str]:
    """Splits a file into its row groups."""
    del samples_per_input
    number = open_parquet(path).num_row_groups
    if number == 0:
        raise UserError(f"{path}: holds no rows.")
    return [f"{path}{paths.RANGE_MARK}{i}-{i}" for i in range(number)]


def read(path: str, reading: Reading) -> Iterator[Sample]:
    """Yields the samples of a row group, or of a whole file."""
    file, span = paths.split_range(path)
    columns, source = columns_of(file, reading.columns), open_parquet(file)
    groups = [int(span.split("-")[0])] if span else list(range(source.num_row_groups))
    names = [name for name in (columns.image, columns.text, columns.id) if name is not None]
    for group in groups:
        number = sum(source.metadata.row_group(i).num_rows for i in range(group))
        for batch in batches(source, group, names, file):
            for row in rows_of(batch):
                yield sample_of(row, columns, key_of_row(file, number), reading.images)
                number += 1


def rows_of(batch: Any) -> Iterator[dict[str, Any] | None]:
    """Yields the rows of a batch; None for one whose text is not UTF-8."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield None


def sample_of(row: dict[str, Any] | None, columns: Columns, default_key: str, images: str | None) -> Sample:
    """Returns the sample of a row. A problem is stored in it, not raised."""
    if row is None:
        return Sample(default_key, [], problem="text_not_utf8")
    name = row.get(columns.id) if columns.id else default_key
    key = default_key if name is None else printable(str(name))
    text, cells = row[columns.text], cells_of(row[columns.image] if columns.image else None)
    sample = Sample(key, [], uid=uid_of_cell(name, columns.id))
    if text is None:
        return sample._replace(problem="text_missing")
    if columns.kind == "document":
        return document_of(sample, text, cells, images)
    if columns.kind == "caption":
        if len(cells) != 1:
            return sample._replace(problem="several_images" if cells else "image_missing")
        sample = sample._replace(text=text)
    else:
        try:
            sample = sample._replace(conversations=talk_of(text))
        except (ValueError, RecursionError):
            return sample._replace(problem="json_invalid")
    return with_pictures(sample, lambda: cells, lambda cell: picture_of(cell, images, key))


def uid_of_cell(name: Any, column: str | None) -> str | None:
    """Returns the id of a sample by the cell that names it, as curate/filter/pool.py reads it: a column uid holds ids,
    other columns names of any form."""
    if name is None:
        return None
    text = str(name)
    return (text.lower() if parse_uid(text) else None) if column == "uid" else uid_of_text(text)


def document_of(sample: Sample, texts: list[str | None], cells: list[Any], images: str | None) -> Sample:
    """Returns an interleaved document. Pictures stand where the parallel list of texts has null, or before the text
    that they name by matched_text_index; pictures of a pixel are left out and noted, as in tars."""
    placed = place_cells(texts, cells)
    if placed is None:
        return sample._replace(problem="image_count_mismatch")
    texts, cells = placed
    try:
        found = [None if cell is None else picture_of(cell, images, sample.key) for cell in cells]
        kept = [None if one is None else larger_than_a_pixel(one[0]) for one in found]
    except ImageError as problem:
        return sample._replace(problem=problem.reason)
    notes = tuple(note for one in found if one is not None for note in one[1])
    return interleaved(sample.key, texts, kept, notes)._replace(uid=sample.uid)


def place_cells(texts: list[str | None], cells: list[Any]) -> tuple[list[str | None], list[Any]] | None:
    """Returns parallel lists of texts and picture cells, None in the one where the other has something."""
    if cells and all(isinstance(cell, dict) and "matched_text_index" in cell for cell in cells):
        places = [cell["matched_text_index"] for cell in cells]
        if not all(isinstance(place, int) and 0 <= place < len(texts) for place in places):
            return None
        before: dict[int, list[Any]] = {}
        for cell, place in zip(cells, places, strict=True):
            before.setdefault(place, []).append(cell)
        ordered: list[tuple[str | None, Any]] = []
        for i, text in enumerate(texts):
            ordered += [(None, cell) for cell in before.get(i, ())]
            ordered.append((text, None))
        return [text for text, _ in ordered], [cell for _, cell in ordered]
    if len(cells) == len(texts):
        return texts, cells
    if len(cells) == texts.count(None):
        left = iter(cells)
        return texts, [next(left) if text is None else None for text in texts]
    return None


def cells_of(value: Any) -> list[Any]:
    """Returns the pictures of a row; an empty cell means text alone."""
    if value is None or value == "" or value == b"":
        return []
    return list(value) if isinstance(value, list) else [value]


def picture_of(cell: Any, images: str | None, key: str) -> tuple[bytes, list[str]]:
    """Returns the contents of a picture: bytes, a struct of bytes and path, base64, or a path under --images."""
    if isinstance(cell, dict):
        if cell.get("image_base64"):
            return decode_base64(cell["image_base64"]), []
        names = (cell.get(name) for name in ("bytes", "path", "image_name"))
        cell = next((value for value in names if value is not None), None)
    if isinstance(cell, bytes):
        return cell, []
    if isinstance(cell, str) and cell.startswith("data:"):
        return picture_of_url(cell), []
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


def offsets(path: str) -> np.ndarray:
    """Returns int64 [n, 2]: the row group of each row and its place there. Raises UserError for large row groups."""
    metadata = open_parquet(path).metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size for group in groups), default=0)
    if largest > MAX_INDEXED_BYTES:
        raise UserError(
            f"{path}: a row group holds {largest / 2**20:,.0f} MiB, and a sample drawn at random reads a whole one; "
            "pack the file with oq2vl_jax.data.pack."
        )
    numbers = [(i, row) for i, group in enumerate(groups) for row in range(group.num_rows)]
    return np.array(numbers, np.int64).reshape(-1, 2)


def read_one(path: str, group: int, number: int, reading: Reading) -> Sample:
    columns = columns_of(path, reading.columns)
    table, first = group_of(path, group, tuple(name for name in (columns.image, columns.text, columns.id) if name))
    row = next(rows_of(table.slice(number, 1)))
    return sample_of(row, columns, key_of_row(path, first + number), reading.images)


@functools.lru_cache(maxsize=KEPT_GROUPS)
def group_of(path: str, group: int, names: tuple[str, ...]) -> tuple[Any, int]:
    """Returns (the rows of a row group, the number of its first row in the file)."""
    import pyarrow

    source = open_parquet(path)
    first = sum(source.metadata.row_group(i).num_rows for i in range(group))
    return pyarrow.Table.from_batches(list(batches(source, group, list(names), path))), first


def picture_versions(inputs: list[str], reading: Reading) -> str:
    """Returns a digest of the pictures of a folder that the inputs name; "" if they hold their pictures."""
    if reading.images is None or paths.is_remote(reading.images):
        return ""
    digest = hashlib.sha256()
    for name in (name for path in inputs for name in picture_names(path, reading)):
        try:
            version = paths.file_version(paths.join(reading.images, name))
        except (OSError, ValueError):  # missing or no name: counted when the row is read
            version = None
        digest.update(json.dumps([name, version]).encode())
    return digest.hexdigest()


def bytes_alone() -> tuple[Any, ...]:
    """Returns the types of columns that hold pictures and name none."""
    import pyarrow as pa

    kinds = pa.binary(), pa.large_binary()
    return *kinds, *map(pa.list_, kinds), *map(pa.large_list, kinds)


def picture_names(path: str, reading: Reading) -> Iterator[str]:
    """Yields the names of the pictures of an input, without reading bytes of pictures."""
    file, span = paths.split_range(path)
    columns, source = columns_of(file, reading.columns), open_parquet(file)
    if columns.image is None:
        return
    leaves = [source.schema.column(i).path for i in range(len(source.schema))]
    leaves = [leaf for leaf in leaves if leaf.split(".")[0] == columns.image]
    if len(leaves) > 1:
        leaves = [leaf for leaf in leaves if leaf.rsplit(".", 1)[-1] in ("path", "image_name")]
    groups = [int(span.split("-")[0])] if span else list(range(source.num_row_groups))
    if not leaves or source.schema_arrow.field(columns.image).type in bytes_alone():
        return
    for group in groups:
        for batch in batches(source, group, leaves, file):
            for row in filter(None, rows_of(batch)):
                for cell in cells_of(row[columns.image]):
                    names = cell.values() if isinstance(cell, dict) else [cell]
                    yield from (name for name in names if isinstance(name, str))


FORMAT = Format(
    matches=lambda path: paths.split_range(path)[0].endswith(".parquet"),
    read=read,
    split=split,
    offsets=offsets,
    read_one=read_one,
    version_beside=picture_versions,
    cuts_long_documents=True,
    takes_columns=True,
    check=check,
    count=lambda path: open_parquet(path).metadata.num_rows,
)
