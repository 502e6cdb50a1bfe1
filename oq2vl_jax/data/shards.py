"""WebDataset tars to Samples: captions (KEY.jpg|png|webp + KEY.txt) and conversations (KEY.json in LLaVA's form).

Several images of a conversation are KEY.0.jpg, KEY.1.jpg, ... in the order of their numbers.
"""

import glob
import gzip
import json
import tarfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from oq2vl_jax.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


class CutOffError(UserError):
    """A tar that ends before its end-of-archive mark, or is none."""


class Sample(NamedTuple):
    """What one key of a shard holds. Exactly one of text and conversations is set, or `problem` says why neither is."""

    key: str
    images: list[bytes]
    text: str | None = None
    conversations: list[dict] | None = None
    problem: str | None = None


def expand_shards(pattern: str) -> list[str]:
    """'DIR/{00000..00009}.tar', a glob or a path, to existing files. Raises UserError naming what is missing."""
    from braceexpand import braceexpand

    try:
        names = list(braceexpand(pattern))
    except ValueError as error:  # its UnbalancedBracesError
        raise UserError(f"--shards {pattern!r}: unbalanced braces.") from error
    found = {name: sorted(glob.glob(name, recursive=True)) for name in names}
    missing = [name for name, files in found.items() if not files]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"--shards {pattern!r}: no file {missing[0]}{more}, of {len(names)} expected.")
    return [file for files in found.values() for file in files]


def read_shard(path: str) -> Iterator[Sample]:
    """Samples in the order of the tar. Raises CutOffError for a tar that is cut off or is none."""
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    num_samples = 0
    try:
        with open(path, "rb") as file:
            members = ({**member, "__url__": path} for member in tar_file_iterator(file))  # pyright: ignore[reportArgumentType] (it wants a stream)
            for fields in group_by_keys(members):
                yield parse_sample(fields)
                num_samples += 1
        _check_end_of_archive(path)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CutOffError(
            f"{path}: the tar is broken or cut off after {num_samples} whole samples "
            f"({error}); "
            "fetch it again, or pass --broken-shards keep to use what is whole."
        ) from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: {error.args[0] if error.args else error}") from error


def parse_sample(fields: dict) -> Sample:
    """One WebDataset sample ({"__key__": ..., suffix: bytes}) to a Sample; problems are named, not raised."""
    key = fields["__key__"].encode("utf-8", "backslashreplace").decode()  # names in a tar can be any bytes
    image_names = [name for name in fields if name.rsplit(".", 1)[-1] in IMAGE_SUFFIXES]
    images = [fields[name] for name in sorted(image_names, key=_image_order)]
    try:
        metadata = json.loads(fields["json"]) if "json" in fields else {}
    except (json.JSONDecodeError, UnicodeDecodeError):
        return Sample(key, images, problem="json_invalid")
    if isinstance(metadata, dict) and "conversations" in metadata:
        conversations = metadata["conversations"]
        return Sample(key, images, conversations=conversations)
    if "txt" not in fields:
        return Sample(key, images, problem="text_missing")
    if not images:
        return Sample(key, images, problem="image_missing")
    try:
        return Sample(key, images, text=fields["txt"].decode("utf-8"))
    except UnicodeDecodeError:
        return Sample(key, images, problem="text_not_utf8")


def _image_order(name: str) -> tuple[int, str]:
    number = name.split(".", 1)[0]
    return (int(number) if number.isdigit() else -1, name)


def _check_end_of_archive(path: str) -> None:
    """A tar ends in zero blocks; one cut exactly between two members would otherwise pass for whole."""
    with open(path, "rb") as file:
        if not tarfile.is_tarfile(path):
            raise tarfile.ReadError("no tar file")
        head = file.read(512)
        file.seek(max(0, file.seek(0, 2) - 512))
        is_plain = head[257:262] == b"ustar"
        if is_plain and any(file.read(512)):
            raise tarfile.ReadError("its end-of-archive mark is missing")
