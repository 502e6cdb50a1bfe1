"""The interface of a file format that samples are read from."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from oq2vl_jax.data.samples.shards import Sample


class Format(NamedTuple):
    """One file format; each module of this folder binds one as FORMAT.

    matches: whether a path, or the file at it, has this format.
    read: (path or an input of `split`, folder of the pictures or None) to its samples, in their order.
    split: (path, samples per input) to inputs that are packed by themselves; None: a file is the smallest input.
    offsets: path to int64 [n, 2], where each sample begins and ends; None: no packing while training.
    read_one: (path, begin, end, folder of the pictures or None) to the sample there.
    version_beside: (inputs, folder of the pictures or None) to a digest of what they name outside of themselves.
    is_fallback: takes every path that no other format matches.
    """

    matches: Callable[[str], bool]
    read: Callable[[str, str | None], Iterator[Sample]]
    split: Callable[[str, int], list[str]] | None = None
    offsets: Callable[[str], np.ndarray] | None = None
    read_one: Callable[[str, int, int, str | None], Sample] | None = None
    version_beside: Callable[[list[str], str | None], str] | None = None
    is_fallback: bool = False
