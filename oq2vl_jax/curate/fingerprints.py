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
        self._exact = np.array([one.exact for one in fingerprints], np.uint64)
        self._near = np.array([bits for one in fingerprints for bits in one.near], np.uint64)
        self._owners = np.array([i for i, one in enumerate(fingerprints) for _ in one.near], np.int64)

    def find(self, wanted: Fingerprint, max_distance: int) -> list[Match]:
        """Returns the pictures with the same bytes and those within max_distance bits, the nearest first.

        Benchmarks share pictures, so there may be several.
        """
        found = dict.fromkeys(np.flatnonzero(self._exact == np.uint64(wanted.exact)).tolist(), -1)
        if wanted.near and len(self._near):
            distances = np.bitwise_count(self._near ^ np.uint64(wanted.near[0]))
            for i in np.flatnonzero(distances <= max_distance):
                owner, distance = int(self._owners[i]), int(distances[i])
                found[owner] = min(found.get(owner, distance), distance)
        return sorted((Match(*one) for one in found.items()), key=lambda match: (match.distance, match.position))

    def save(self, file: io.BufferedIOBase) -> None:
        np.savez(file, exact=self._exact, near=self._near, owners=self._owners)

    @staticmethod
    def load(path: str) -> "Index":
        index: Any = Index([])
        with np.load(path, allow_pickle=False) as saved:
            index._exact, index._near, index._owners = saved["exact"], saved["near"], saved["owners"]
        return index
