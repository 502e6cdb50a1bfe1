"""The interface of a file format that samples are read from."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from oq2vl_jax.data.samples.shards import Sample


class Reading(NamedTuple):
    """How samples are read. images: folder of the pictures that they name. columns: NAME=COLUMN of a parquet file."""

    images: str | None = None
    columns: tuple[str, ...] = ()


class Format(NamedTuple):
    """One file format; each module of this folder binds one as FORMAT.

    matches: whether a path, or the file at it, has this format.
    read: (path or an input of `split`, Reading) to its samples, in their order.
    split: (path, samples per input) to inputs that are packed by themselves; None: a file is the smallest input.
    count: path to the number of its samples; None: only reading them all tells.
    check: says in a line how the file is read, before work begins. Raises UserError if it cannot be.
    offsets: path to int64 [n, 2], where each sample begins and ends; None: no packing while training.
    read_one: (path, begin, end, Reading) to the sample there.
    version_beside: (inputs, Reading) to a digest of what they name outside of themselves.
    holds_pictures: whether its files hold their pictures; else they may name files of a folder.
    cuts_long_documents: whether an interleaved document longer than a row is cut, unless --long-documents says.
    takes_columns: whether --columns can name its fields.
    is_fallback: takes every path that no other format matches.
    """

    matches: Callable[[str], bool]
    read: Callable[[str, Reading], Iterator[Sample]]
    split: Callable[[str, int], list[str]] | None = None
    offsets: Callable[[str], np.ndarray] | None = None
    read_one: Callable[[str, int, int, Reading], Sample] | None = None
    version_beside: Callable[[list[str], Reading], str] | None = None
    holds_pictures: bool = True
    cuts_long_documents: bool = False
    takes_columns: bool = False
    count: Callable[[str], int] | None = None
    check: Callable[[str, Reading], None] | None = None
    is_fallback: bool = False
