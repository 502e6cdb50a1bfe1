"""Reads instruction data: one JSON list of entries (or a .jsonl), and a folder of pictures, as LLaVA's.

    [{"id": "0", "image": "coco/0.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]}, ...]

"image" or "images" is a name, a list of names in the folder of --images, or data URLs; text-only entries have none.
The conversation may have another form of data/samples/chats.py, such as "messages". A list of 10M entries
(MAmmoTH-VL) is never loaded whole: one pass finds where each entry begins and ends, and a task reads its own range.
"""

import codecs
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np

from oq2vl_jax import paths
from oq2vl_jax.data.samples.chats import TALKS, picture_of_url
from oq2vl_jax.data.samples.formats.format import Format, Reading
from oq2vl_jax.data.samples.ids import uid_of_text
from oq2vl_jax.data.samples.images import ImageError
from oq2vl_jax.data.samples.pictures import picture_in_folder, with_pictures
from oq2vl_jax.data.samples.shards import Sample, printable
from oq2vl_jax.errors import UserError

READ_BYTES = 2**20
MAX_ENTRY_BYTES = 64 * 2**20
MARK = codecs.BOM_UTF8.decode("latin-1")
SPACE, BETWEEN = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n,]*")


def is_instructions(path: str) -> bool:
    """True for a .jsonl, and for a .json that holds a list; the published packer's files hold an object."""
    path = paths.split_range(path)[0]
    if path.endswith(".jsonl"):
        return True
    if not path.endswith(".json"):
        return False
    with paths.open_input(path) as file:
        return file.read(READ_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def entry_offsets(path: str) -> np.ndarray:
    """Returns int64 [n, 2], the bytes where each entry begins and ends. Raises UserError that locates a broken one."""
    with paths.open_input(path) as file:
        return np.array(list(find_entries(file, path)), np.int64).reshape(-1, 2)


def find_entries(file: BinaryIO, path: str) -> Iterator[tuple[int, int]]:
    """Yields (begin, end) of every object of a JSON list or of JSON lines, reading a block at a time.

    Bytes are decoded as Latin-1, so that a character is a byte. The non-ASCII bytes of UTF-8 occur only inside strings,
    where they do not affect the structure.
    """
    decoder, number = json.JSONDecoder(), 0
    text, base, position = file.read(READ_BYTES).decode("latin-1"), 0, 0
    position = len(MARK) if text.startswith(MARK) else 0
    position = SPACE.match(text, position).end()  # type: ignore[union-attr]
    is_list = text[position : position + 1] == "["
    position += is_list
    while True:
        position = BETWEEN.match(text, position).end()  # type: ignore[union-attr]
        if position == len(text):
            base, text, position = base + len(text), file.read(READ_BYTES).decode("latin-1"), 0
            if not text and is_list:
                raise UserError(f"{path}: the list ends after {number} entries without its ]; fetch the file again.")
            if not text:
                return
            continue
        if is_list and text[position] == "]":
            behind = text[position + 1 :] + file.read(READ_BYTES).decode("latin-1")
            if behind.strip():
                raise UserError(
                    f"{path}: more follows the list that ends at byte {base + position}; keep one list a file."
                )
            return
        if text[position] != "{":
            raise UserError(f"{path}: entry {number}, at byte {base + position}, is no JSON object.")
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            left = len(text) - position
            block = file.read(max(READ_BYTES, left)) if left < MAX_ENTRY_BYTES else b""
            if not block:
                raise UserError(
                    f"{path}: entry {number}, at byte {base + position}, is not valid JSON or is cut off: {error}."
                ) from error
            base, text, position = base + position, text[position:] + block.decode("latin-1"), 0
            continue
        yield base + position, base + end
        number, position = number + 1, end


def split_into_ranges(path: str, entries_per_task: int) -> list[str]:
    """Splits the file into inputs of `entries_per_task` entries each."""
    offsets = entry_offsets(path)
    if not len(offsets):
        raise UserError(f"{path}: the list is empty.")
    firsts = range(0, len(offsets), entries_per_task)
    lasts = [min(first + entries_per_task, len(offsets)) - 1 for first in firsts]
    return [
        f"{path}{paths.RANGE_MARK}{offsets[a, 0]}-{offsets[b, 1]}" for a, b in zip(firsts, lasts, strict=True)
    ]  # fmt: skip


def read_range(path: str, start: int, stop: int) -> bytes:
    with paths.open_input(path) as file:
        file.seek(start)
        return file.read(stop - start)


def read_instructions(path: str, images: str | None) -> Iterator[Sample]:
    """Yields the samples of an input of split_into_ranges, or of a whole file."""
    file, span = paths.split_range(path)
    if not span:
        for start, stop in entry_offsets(file).tolist():
            yield parse_entry(read_range(file, start, stop), images)
        return
    start, stop = map(int, span.split("-"))
    content = read_range(file, start, stop)
    for begin, end in find_entries(io.BytesIO(content), path):
        yield parse_entry(content[begin:end], images)


def parse_entry(entry: bytes, images: str | None) -> Sample:
    """Parses one entry and reads its pictures. A problem of the entry is stored in the sample, not raised."""
    try:
        value = json.loads(entry)
    except (ValueError, RecursionError):
        return Sample("?", [], problem="json_invalid")
    talk = next((value[name] for name in TALKS if name in value), None) if isinstance(value, dict) else None
    if talk is None:
        return Sample("?", [], problem="conversation_invalid")
    name = value.get("id")
    key = "?" if name is None else printable(str(name))
    sample = Sample(key, [], conversations=talk, uid=None if name is None else uid_of_text(key))
    return with_pictures(sample, lambda: names_in(value), lambda name: picture_of(name, images, key))


def names_in(entry: dict) -> list[str]:
    """Returns the names of an entry's pictures; "" and null mean text alone. Raises ImageError."""
    value = entry.get("image") or entry.get("images") or []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ImageError("image_invalid", "expected a name or a list of names")
    return names


def picture_of(name: str, images: str | None, key: str) -> tuple[bytes, list[str]]:
    return (picture_of_url(name), []) if name.startswith("data:") else picture_in_folder(name, images, key)


def picture_versions(files: Iterable[str], images: str | None) -> str:
    """Returns a digest that changes when a picture that the inputs name is replaced; "" without a local folder.

    Pictures in a bucket are not checked, because each would take a request.
    """
    if images is None or paths.is_remote(images):
        return ""
    digest = hashlib.sha256()
    for file in files:
        for name in image_names(file):
            try:
                version = paths.file_version(paths.join(images, name))
            except (OSError, ValueError):  # missing, or not a file name: counted when the entry is read
                version = None
            digest.update(json.dumps([name, version]).encode())
    return digest.hexdigest()


def image_names(path: str) -> Iterator[str]:
    """Yields the names of the images of all entries of an input, in their order."""
    file, span = paths.split_range(path)
    start, stop = map(int, span.split("-")) if span else (0, paths.file_version(file)[0])
    content = read_range(file, start, stop)
    for begin, end in find_entries(io.BytesIO(content), path):
        try:
            yield from (name for name in names_in(json.loads(content[begin:end])) if not name.startswith("data:"))
        except (ValueError, RecursionError, AttributeError, ImageError):
            continue


def read_one(path: str, begin: int, end: int, reading: Reading) -> Sample:
    return parse_entry(read_range(path, begin, end), reading.images)


FORMAT = Format(
    is_instructions,
    lambda path, reading: read_instructions(path, reading.images),
    split_into_ranges,
    entry_offsets,
    read_one,
    lambda inputs, reading: picture_versions(inputs, reading.images),
    holds_pictures=False,
    count=lambda path: len(entry_offsets(path)),
)
