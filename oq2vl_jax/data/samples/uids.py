"""Reads, writes and searches sets of sample ids in DataComp's format: a sorted .npy of dtype "u8,u8", the high and low
64 bits of 32 hex digits.

A set may hold an id n times; it then asks for n copies of the sample.
"""

import functools
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from oq2vl_jax import paths
from oq2vl_jax.errors import UserError

UID_DTYPE = np.dtype("u8,u8")
MAX_PER_BUCKET = 64
"""Limit on ids per bucket of the index, and on ids with the same high half; sets above it use a slower search. Random
ids give about one per bucket."""

BLOCK = 2**22
"""Ids that `contains` searches at a time."""


class UidSet:
    """Ids as two sorted arrays. Comparing plain 64-bit integers is 40 times as fast as numpy's structured dtype."""

    def __init__(self, high: ArrayLike, low: ArrayLike):
        """high, low: uint64 [n], in any order."""
        high, low = np.asarray(high, np.uint64), np.asarray(low, np.uint64)
        if not _is_sorted(high, low):
            order = np.argsort(high)
            if _longest_run(high[order]) > 1:
                order = np.lexsort((low, high))
            high, low = high[order], low[order]
        self.high, self.low = high, low
        self._longest_run = _longest_run(high)

    def __len__(self) -> int:
        return len(self.high)

    @staticmethod
    def load(path: str) -> "UidSet":
        """Loads a set. Raises UserError for a file that is not a uid set."""
        try:
            with paths.open_input(path) as file:
                uids = np.load(file, allow_pickle=False)
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file; a uid set (.npy of dtype u8,u8) is expected.") from error
        except (ValueError, EOFError, MemoryError) as error:
            raise UserError(
                f"{path}: not a whole .npy file; a uid set of dtype u8,u8 is expected, as curate.filter writes."
            ) from error
        if not isinstance(uids, np.ndarray):
            raise UserError(f"{path}: an archive of arrays; a uid set is one array (np.save).")
        if uids.dtype != UID_DTYPE or uids.ndim != 1:
            raise UserError(f"{path}: expected a 1-d array of dtype u8,u8, got {uids.dtype} with shape {uids.shape}.")
        return UidSet(uids["f0"], uids["f1"])

    def save(self, path: str) -> None:
        uids = np.empty(len(self), UID_DTYPE)
        uids["f0"], uids["f1"] = self.high, self.low
        with paths.whole_output(path) as partial, Path(partial).open("wb") as file:
            np.save(file, uids)

    def sha256(self) -> str:
        """Returns the hash that identifies the set."""
        return hashlib.sha256(self.high.astype("<u8").tobytes() + self.low.astype("<u8").tobytes()).hexdigest()

    def unique(self) -> "UidSet":
        is_first = np.ones(len(self), bool)
        is_first[1:] = (np.diff(self.high) != 0) | (np.diff(self.low) != 0)
        return UidSet(self.high[is_first], self.low[is_first])

    def find(self, high: np.ndarray, low: np.ndarray) -> np.ndarray:
        """Returns the first position of each id in the set, or -1 for an id that is not in the set."""
        indices = np.full(len(high), -1, np.int64)
        if not len(self):
            return indices
        if self._longest_run > MAX_PER_BUCKET:
            return self._find_pairs(high, low)
        start = self._lower_bound(high)
        for offset in range(self._longest_run - 1, -1, -1):  # a run shares the high half; random ids have runs of 1
            position = np.minimum(start + offset, len(self) - 1)
            matches = (self.high[position] == high) & (self.low[position] == low)
            indices[matches] = position[matches]
        return indices

    def _find_pairs(self, high: np.ndarray, low: np.ndarray) -> np.ndarray:
        """Replaces find if the high halves are not random: numpy's structured comparison, 0.1M ids a second."""
        ours, asked = np.empty(len(self), UID_DTYPE), np.empty(len(high), UID_DTYPE)
        ours["f0"], ours["f1"], asked["f0"], asked["f1"] = self.high, self.low, high, low
        position = np.minimum(ours.searchsorted(asked), len(self) - 1)
        return np.where((self.high[position] == high) & (self.low[position] == low), position, -1)

    @functools.cached_property
    def _index(self) -> tuple[np.uint64, np.ndarray | None]:
        return _index(self.high)

    def _lower_bound(self, high: np.ndarray) -> np.ndarray:
        """Returns np.searchsorted(self.high, high), at most the last position; three times as fast for random ids."""
        last = len(self) - 1
        shift, starts = self._index
        if starts is None:
            return np.minimum(np.searchsorted(self.high, high), last)
        start = starts[high >> shift]
        behind = np.flatnonzero(self.high[start] < high)
        while len(behind):
            start[behind] = np.minimum(start[behind] + 1, last)
            is_behind = (self.high[start[behind]] < high[behind]) & (start[behind] < last)
            behind = behind[is_behind]
        return start

    def contains(self, high: np.ndarray, low: np.ndarray) -> np.ndarray:
        """Returns which ids are in the set, bool [n]."""
        is_in = np.empty(len(high), bool)
        for start in range(0, len(high), BLOCK):  # find takes 40 bytes an id
            block = slice(start, start + BLOCK)
            is_in[block] = self.find(high[block], low[block]) >= 0
        return is_in

    def count(self, high: int, low: int) -> int:
        """Returns how many times an id is in the set."""
        start, end = (np.searchsorted(self.high, np.uint64(high), side) for side in ("left", "right"))
        return int((self.low[start:end] == np.uint64(low)).sum())


def _is_sorted(high: np.ndarray, low: np.ndarray) -> bool:
    return bool(((high[:-1] < high[1:]) | ((high[:-1] == high[1:]) & (low[:-1] <= low[1:]))).all())


def _longest_run(values: np.ndarray) -> int:
    """Returns the length of the longest run of equal values in a sorted array."""
    if not len(values):
        return 0
    starts = np.flatnonzero(values[1:] != values[:-1]) + 1
    return int(np.diff(starts, prepend=0, append=len(values)).max())


def _index(high: np.ndarray) -> tuple[np.uint64, np.ndarray | None]:
    """Returns (shift, starts): ids with high >> shift == b begin at starts[b]. starts is None if a bucket holds more
    than MAX_PER_BUCKET ids, so that the high halves are far from random."""
    bits = min(max(len(high).bit_length() + 1, 1), 26)
    shift = np.uint64(64 - bits)
    counts = np.bincount((high >> shift).astype(np.int64), minlength=1 << bits)
    return shift, None if counts.max(initial=0) > MAX_PER_BUCKET else np.minimum(
        np.cumsum(counts) - counts, max(len(high) - 1, 0)
    ).astype(np.int32 if len(high) < 2**31 else np.int64)
