"""Fingerprints of pictures: the bytes, and a 64-bit perceptual hash that survives resizing, re-encoding and a crop.

The perceptual hash is pHash (imagehash): the signs of 64 low frequencies of a 32 x 32 grey picture. A benchmark's
picture has two, of the whole and of what is left when 2 % are cut from every side, because a crop moves more bits than
any re-encoding. Among 285,000 pairs of unrelated pictures the smallest distance was 8 (docs/experiments.md).
"""

import io
from typing import Any, NamedTuple

import numpy as np
import xxhash
from PIL import Image

from oq2vl_jax.data.samples.images import ImageError, open_rgb
from oq2vl_jax.errors import UserError

CROP = 0.02
FLAT_RANGE = 12
"""A picture whose grey values differ by less has no structure, and its perceptual hash no meaning."""


class Fingerprint(NamedTuple):
    """exact: digest of the bytes. near: perceptual hashes, none of a picture without structure or that is broken."""

    exact: int
    near: tuple[int, ...]


class Match(NamedTuple):
    """position: of the nearest picture of the index. distance: bits that differ; -1 if the bytes are the same."""

    position: int
    distance: int


def check_has_imagehash(command: str) -> None:
    import importlib.util

    if importlib.util.find_spec("imagehash") is None:
        raise UserError(f"{command} needs the extra: pip install 'oq2vl-jax[overlap]'.")


def fingerprint(data: bytes, is_cropped_too: bool = False) -> Fingerprint:
    """Returns the fingerprint of an encoded picture. is_cropped_too: also of the picture without its outermost 2 %."""
    exact = xxhash.xxh3_64_intdigest(data)
    try:
        image = open_rgb(data)
    except ImageError:
        return Fingerprint(exact, ())
    grey = image.convert("L")
    low, high = grey.reduce(8).getextrema() if min(grey.size) >= 16 else grey.getextrema()
    if high - low < FLAT_RANGE:  # pyright: ignore[reportOperatorIssue]
        return Fingerprint(exact, ())
    views = [grey]
    if is_cropped_too:
        dx, dy = max(1, round(CROP * grey.width)), max(1, round(CROP * grey.height))
        if min(grey.width - 2 * dx, grey.height - 2 * dy) >= 16:
            views.append(grey.crop((dx, dy, grey.width - dx, grey.height - dy)))
    return Fingerprint(exact, tuple(perceptual_hash(view) for view in views))


def perceptual_hash(image: Image.Image) -> int:
    import imagehash

    return int.from_bytes(np.packbits(imagehash.phash(image).hash).tobytes(), "big")


class Index:
    """The fingerprints of some pictures, searched by another one's."""

    def __init__(self, fingerprints: list[Fingerprint]):
        self._exact = {one.exact: i for i, one in reversed(list(enumerate(fingerprints)))}
        self._near = np.array([bits for one in fingerprints for bits in one.near], np.uint64)
        self._owners = np.array([i for i, one in enumerate(fingerprints) for _ in one.near], np.int64)

    def find(self, wanted: Fingerprint, max_distance: int) -> Match | None:
        """Returns the picture with the same bytes, else the nearest within max_distance bits, else None."""
        if wanted.exact in self._exact:
            return Match(self._exact[wanted.exact], -1)
        if not wanted.near or not len(self._near):
            return None
        distances = np.bitwise_count(self._near ^ np.uint64(wanted.near[0]))
        nearest = int(distances.argmin())
        if distances[nearest] > max_distance:
            return None
        return Match(int(self._owners[nearest]), int(distances[nearest]))

    def save(self, file: io.BufferedIOBase) -> None:
        exact = np.array([[key & (2**64 - 1), position] for key, position in self._exact.items()], np.uint64)
        np.savez(file, exact=exact.reshape(-1, 2), near=self._near, owners=self._owners)

    @staticmethod
    def load(path: str) -> "Index":
        index: Any = Index([])
        with np.load(path, allow_pickle=False) as saved:
            index._exact = {int(key): int(position) for key, position in saved["exact"]}
            index._near, index._owners = saved["near"], saved["owners"]
        return index
