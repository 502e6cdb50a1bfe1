"""Reads the files of a tar, grouped by key as in WebDataset, and names every kind of damage.

Nothing is extracted to disk, and nothing is skipped silently: content that cannot be used becomes a Members with a
`problem`, or ends the tar with a CutOffError. Deviation: webdataset's reader takes a broken header for the end of the
tar, and stops at the first duplicate. Headers of ordinary files are parsed here, in a third of tarfile's time; from the
first other header on, tarfile reads the tar.
"""

import errno
import gzip
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO, NamedTuple

from oq2vl_jax import paths
from oq2vl_jax.errors import UserError

MAX_MEMBER_BYTES, MAX_SAMPLE_BYTES = 256 * 2**20, 512 * 2**20
"""A larger member is refused from its header, before it is read; a larger sample keeps none of its files."""
MAX_HEADER_BYTES = 2**20
"""Limit of an extended header or a long name; a larger one is treated as damage."""
EXTENDED_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
                    tarfile.GNUTYPE_LONGLINK)  # fmt: skip
BLOCK = 512
KEY_AND_SUFFIX = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
PAX_NAMES_OF_NO_EFFECT = re.compile(rb"\d+ (mtime|atime|ctime|uid|gid|uname|gname)=")
"""webdataset writes an extended header before each member, only to store its time."""

BROKEN = (tarfile.TarError, EOFError, RecursionError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, OSError, ValueError,
          LookupError, OverflowError, MemoryError)  # fmt: skip
"""Exceptions of tarfile and the decompressors on false headers."""

ReadData = Callable[[], tuple[bytes, str | None]]
"""Returns (content of a file, the problem if it cannot be used)."""


class CutOffError(UserError):
    """A tar that ends before its end-of-archive mark, holds a broken header, or is not a tar."""


class Members(NamedTuple):
    """The files of one key, by lower-case suffix, bytes unchanged; `problem` says why they cannot be used."""

    key: str
    files: dict[str, bytes]
    problem: str | None = None


def read_members(path: str) -> Iterator[Members]:
    """Yields the keys of a tar in its order; neighbours of the same key form one Members. Raises CutOffError."""
    num_keys = 0
    try:
        with paths.open_input(path) as stream:
            for group in group_by_key(stream):
                yield group
                num_keys += 1
    except UserError:
        raise
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # an error of the disk, not of the tar; EINVAL is a seek to an impossible position
        reason = str(error).partition("\n")[0].rstrip(":")
        raise CutOffError(
            f"{path}: the tar is broken or cut off after {num_keys} whole samples ({reason}); "
            "fetch it again, or pass --broken-shards keep to use what is whole."
        ) from error


def group_by_key(stream: BinaryIO) -> Iterator[Members]:
    """Yields the samples. Files that belong to no sample (README, ._0001.txt) do not split the sample around them; they
    follow it as Members of their own with a problem."""
    seen = set()
    group: Members | None = None
    strays: list[Members] = []
    for name, read in read_files(stream):
        key, suffix = split_name(name)
        if not suffix:
            strays.append(Members(key, {}, name_problem(name)))
            continue
        if group is None or key != group.key:
            yield from [*([group] if group else []), *strays]
            strays.clear()
            group = Members(key, {}, "duplicate_key" if key in seen else None)
            seen.add(key)
        group = with_member(group, suffix, read, name_problem(name))
    yield from [*([group] if group else []), *strays]


def with_member(group: Members, suffix: str, read: ReadData, problem: str | None) -> Members:
    """Returns the sample with one more file, which is not read if its name has a problem. A sample that grows too large
    keeps no files, and no more of it are read."""
    if group.problem == "sample_too_large":
        return group
    data, problem = (b"", problem) if problem else read()
    if suffix in group.files:
        problem = problem or "duplicate_member"
    group.files[suffix] = data
    if sum(map(len, group.files.values())) > MAX_SAMPLE_BYTES:
        group.files.clear()
        return group._replace(problem="sample_too_large")
    return group._replace(problem=group.problem or problem)


def key_offsets(path: str) -> list[tuple[int, int]]:
    """Returns where the members of each key, and each member without a key, begin and end in an uncompressed tar.

    Raises UserError.
    """
    spans: list[tuple[int, int]] = []
    last_key, last_span = None, -1
    try:
        with tarfile.open(path, "r:", tarinfo=CheckedHeader) as tar:
            for member in tar:
                if member.isdir():
                    continue
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if not split_name(member.name)[1]:  # a span of its own, even inside the span of a sample
                    spans.append((member.offset, end))
                    continue
                key = split_name(member.name)[0]
                if key == last_key:
                    spans[last_span] = (spans[last_span][0], end)
                else:
                    spans.append((member.offset, end))
                    last_key, last_span = key, len(spans) - 1
            check_end_of_archive(tar)
    except UserError:
        raise
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise CutOffError(f"{path}: the tar is compressed, broken or cut off ({error}).") from error
    return spans


def read_key(path: str, begin: int, end: int) -> Members:
    """Reads the members between two offsets of key_offsets. Raises CutOffError."""
    with open(path, "rb") as stream:
        stream.seek(begin)
        content = stream.read(end - begin)
    try:
        return next(group_by_key(io.BytesIO(content + bytes(2 * BLOCK))))
    except (tarfile.TarError, StopIteration) as error:
        raise CutOffError(
            f"{path}: no whole sample at byte {begin}; put the tar back as it was when the run started."
        ) from error


def read_files(stream: BinaryIO) -> Iterator[tuple[str, ReadData]]:
    """Yields (name, function that reads the content) of each file; call the function before taking the next file."""
    position = 0
    while True:
        stream.seek(position)
        start = position
        header = stream.read(BLOCK)
        if header[156:157] == b"x":
            size = parse_octal(header[124:136])
            is_small = (size or 0) <= MAX_HEADER_BYTES
            records = stream.read(-(-(size or 0) // BLOCK) * BLOCK)[:size] if is_small else b""
            if is_small and is_ordinary(header) and all(map(PAX_NAMES_OF_NO_EFFECT.match, records.splitlines())):
                position += BLOCK + len(records) + -len(records) % BLOCK
                header = stream.read(BLOCK)
        name, size = ordinary_file(header)
        if name is None:
            stream.seek(start)
            yield from read_files_with_tarfile(stream)
            return
        yield name, partial(read_file, stream, name, size)
        position += BLOCK + size + -size % BLOCK


def read_file(stream: BinaryIO, name: str, size: int) -> tuple[bytes, str | None]:
    if size > MAX_MEMBER_BYTES:
        return b"", "member_too_large"
    data = stream.read(size)
    if len(data) != size:
        raise tarfile.ReadError("unexpected end of data")
    check_swallows_nothing(name, data)
    return data, None


def ordinary_file(header: bytes) -> tuple[str | None, int]:
    """Returns (name, size) from a plain file's header; name is None for every header that needs tarfile."""
    if header[156:157] not in (b"0", b"\0") or not is_ordinary(header):
        return None, 0
    name, prefix, size = until_zero(header[:100]), until_zero(header[345:500]), parse_octal(header[124:136])
    if size is None or not name or name.endswith(b"/"):
        return None, 0
    if prefix and header[257:263] == b"ustar\0":  # GNU tar has other fields in that place
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape"), size


def is_ordinary(header: bytes) -> bool:
    """Returns whether a header is of ustar, pax or GNU tar and its checksum is right."""
    if len(header) != BLOCK or header[257:262] != b"ustar":
        return False
    return parse_octal(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * ord(" ")


def until_zero(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def parse_octal(field: bytes) -> int | None:
    """Parses an octal number; None for an empty field and for GNU's binary numbers."""
    digits = until_zero(field).strip(b" ")
    return int(digits, 8) if digits.isdigit() and not set(digits) & set(b"89") else None


class CheckedHeader(tarfile.TarInfo):
    """Refuses an extended header that claims to be large before tarfile allocates memory for it."""

    def _proc_member(self, tar: tarfile.TarFile):  # tarfile's own comments name it as the method to override
        if self.type in EXTENDED_HEADERS and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header claims {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def read_files_with_tarfile(stream: BinaryIO) -> Iterator[tuple[str, ReadData]]:
    """Reads the rest of a tar from the position of the stream: compressed, or with headers that are not ordinary."""
    with tarfile.open(fileobj=stream, mode="r:*", tarinfo=CheckedHeader) as tar:
        for member in tar:
            if not member.isdir():
                yield member.name, partial(read_with_tarfile, tar, member)
        check_end_of_archive(tar)


def read_with_tarfile(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[bytes, str | None]:
    problem = None if member.isreg() and not member.issparse() else "not_a_plain_file"
    if not problem and member.size > MAX_MEMBER_BYTES:
        problem = "member_too_large"
    if problem:
        return b"", problem
    file = tar.extractfile(member)
    assert file is not None  # a plain file has content
    data = file.read()
    if len(data) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    check_swallows_nothing(member.name, data)
    return data, None


def name_problem(name: str) -> str | None:
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        return "unsafe_name"
    return None if split_name(name)[1] else "name_without_suffix"


def split_name(name: str) -> tuple[str, str]:
    """Splits a name into (key, lower-case suffix) as WebDataset does, at the first dot after the last slash."""
    readable = name.encode("utf-8", "backslashreplace").decode()  # names in a tar can be any bytes
    match = KEY_AND_SUFFIX.fullmatch(readable)
    return (match[1], match[2].lower()) if match else (readable, "")


def check_swallows_nothing(name: str, data: bytes) -> None:
    """Raises ReadError if the data hold other members, because the header of `name` claims too many bytes."""
    index = data.find(b"ustar")
    while index >= 0:
        start = index - 257
        if start >= 0 and start % BLOCK == 0:
            try:
                tarfile.TarInfo.frombuf(data[start : start + BLOCK], "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                pass
            else:
                raise tarfile.ReadError(f"the header of {name} claims {len(data)} bytes and swallows other members")
        index = data.find(b"ustar", index + 1)


def check_end_of_archive(tar: tarfile.TarFile) -> None:
    """Raises ReadError unless the tar ends in zero blocks and nothing follows them. Otherwise a tar that is cut between
    two members, has a broken or zeroed header, or is followed by another tar would pass as whole."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(BLOCK)
    if len(block) < BLOCK:
        raise tarfile.ReadError("its end-of-archive mark is missing")
    if any(block):
        raise tarfile.ReadError(f"the header at byte {tar.offset} is broken")
    while block := tar.fileobj.read(2**20):
        if block.count(0) != len(block):
            raise tarfile.ReadError(f"more data follows the end-of-archive mark at byte {tar.offset}")
