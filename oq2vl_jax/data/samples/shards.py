"""Reads tars as Samples: captions, conversations, interleaved documents.

    caption       KEY.jpg|png|webp + KEY.txt
    conversation  KEY.json with "conversations" (LLaVA) + KEY.jpg, or KEY.0.jpg, KEY.1.jpg, ... in the order of numbers
    interleaved   KEY.json with "texts" (null for an image) and the parallel "image_info" of {"image_base64"}
                  or null (OBELICS, MMC4); or KEY.tiff, one page for each null of "texts" (MINT)

Content that cannot be used becomes a Sample with a `problem`; no sample is dropped.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from oq2vl_jax.data.samples.ids import uid_of_key
from oq2vl_jax.data.samples.images import ImageError, embedded_image, tiff_pages
from oq2vl_jax.data.samples.tars import Members, read_members

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
TIFF_SUFFIXES = ("tiff", "tif")


class Sample(NamedTuple):
    """The content of one key. Without a `problem`, exactly one of text, conversations and elements is set.

    elements: an interleaved document, with None for the next of `images`. notes: oddities, and repairs while reading.
    uid: its id in the metadata, or one made from its key; for filters.
    """

    key: str
    images: list[bytes]
    text: str | None = None
    conversations: Any = None
    elements: list[str | None] | None = None
    problem: str | None = None
    notes: tuple[str, ...] = ()
    uid: str | None = None


def read_samples(path: str) -> Iterator[Sample]:
    """Yields the samples of a tar, in their order."""
    for members in read_members(path):
        yield sample_of(members)


def sample_of(members: Members) -> Sample:
    if members.problem:
        return Sample(members.key, [], problem=members.problem)
    return parse_sample(members)._replace(uid=uid_of(members))


def uid_of(members: Members) -> str | None:
    """Returns the "uid" of KEY.json, 32 hex digits in DataComp; without one (img2dataset), an id made from the key."""
    try:
        metadata = json.loads(members.files.get("json", b"null"))
    except (ValueError, RecursionError):
        metadata = None
    if isinstance(metadata, dict) and "uid" in metadata:
        return printable(metadata["uid"]) if isinstance(metadata["uid"], str) else None
    return uid_of_key(members.key.rsplit("/", 1)[-1])


def parse_sample(members: Members) -> Sample:
    """Parses the files of one key. A problem is stored in the sample, not raised."""
    key, files = members.key, members.files
    image_names = [name for name in files if name.rsplit(".", 1)[-1] in IMAGE_SUFFIXES]
    images = [files[name] for name in sorted(image_names, key=_image_order)]
    try:
        metadata = json.loads(files["json"]) if "json" in files else {}
    except (ValueError, RecursionError):
        return Sample(key, images, problem="json_invalid")
    if isinstance(metadata, dict) and "conversations" in metadata:
        return Sample(key, images, conversations=metadata["conversations"])
    if isinstance(metadata, dict) and "texts" in metadata:
        tiff = next((files[suffix] for suffix in TIFF_SUFFIXES if suffix in files), None)
        return parse_interleaved(key, metadata, tiff)
    if "txt" not in files:
        return Sample(key, images, problem="text_missing")
    if len(images) != 1:
        return Sample(key, images, problem="image_missing" if not images else "several_images")
    try:
        return Sample(key, images, text=files["txt"].decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Sample(key, images, problem="text_not_utf8")


def parse_interleaved(key: str, metadata: dict, tiff: bytes | None = None) -> Sample:
    """Parses OBELICS and MMC4 (images in the JSON) or MINT (pages of a TIFF). Images of width or height 1 and empty
    places are dropped, as in the published code, and noted."""
    texts = metadata["texts"]
    if not isinstance(texts, list) or not all(text is None or isinstance(text, str) for text in texts):
        return Sample(key, [], problem="interleaved_invalid")
    try:
        if tiff is None:
            images = embedded_images(metadata.get("image_info"), len(texts))
        else:
            images = spread_pages(tiff_pages(tiff), texts)
    except ImageError as problem:
        return Sample(key, [], problem=problem.reason)
    if images is None:
        return Sample(key, [], problem="interleaved_invalid" if tiff is None else "image_count_mismatch")
    return interleaved(key, texts, images, ("pages_re_encoded",) if tiff is not None else ())


def interleaved(key: str, texts: list[str | None], images: list[bytes | None], notes: tuple[str, ...] = ()) -> Sample:
    """Returns the document of two parallel lists. Empty places, and pictures beside a text, are left out and noted."""
    places = [(text, image) for text, image in zip(texts, images, strict=True) if text is not None or image is not None]
    notes = ("empty_image_place",) * (len(texts) - len(places)) + notes
    notes += ("image_beside_text",) * sum(text is not None and image is not None for text, image in places)
    kept = [image for text, image in places if text is None and image is not None]
    return Sample(key, kept, elements=[text for text, _ in places], notes=notes)


def spread_pages(pages: list[bytes | None], texts: list[str | None]) -> list[bytes | None] | None:
    """Puts the i-th page at the i-th null of `texts`; returns None if their numbers differ."""
    if len(pages) != texts.count(None):
        return None
    remaining = iter(pages)
    return [next(remaining) if text is None else None for text in texts]


def embedded_images(image_info: Any, count: int) -> list[bytes | None] | None:
    """Returns the images of the list "image_info", None for an entry without one; None if it is not parallel."""
    if not isinstance(image_info, list) or len(image_info) != count:
        return None
    encoded = [info.get("image_base64") if isinstance(info, dict) else None for info in image_info]
    return [embedded_image(text) if text else None for text in encoded]


def printable(text: str) -> str:
    """Escapes lone surrogates, which JSON can spell but no file can hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def _image_order(name: str) -> tuple[int, str]:
    number = name.split(".", 1)[0]
    return (int(number) if re.fullmatch("[0-9]{1,9}", number) else -1, name)
