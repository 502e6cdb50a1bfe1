"""Bin packing: puts documents into rows under two budgets, tokens and images. Pure numpy and integers, no I/O.

A row takes the longest remaining document, then the longest that still fits, and so on, like the first row of first-fit
decreasing. Deviation: the last documents of a row are chosen to fill it. First-fit decreasing stops when nothing small
enough remains, half a caption short on average. Here, once at most NEAR_END more documents could fit, the row takes
documents of the mean length that would fill it:

    row of 10 tokens, documents 6 3 3 2 2       first-fit decreasing: [6 3] and 1 token free
                                                here: 6, then room for 4 = two documents of 2: [6 2 2]

The remaining lengths are the bits of one Python integer (bit n: a document of n tokens). Finding the longest that fits
takes one AND and one bit_length, so the time is linear in the number of documents, whatever their lengths.
"""

import itertools
import operator

import numpy as np
from numpy.typing import ArrayLike

NEAR_END = 12
"""Documents at the end of a row whose lengths are chosen to fill it. A larger number fills better and takes longer:
fill of 20k captions 8: 0.994, 12: 0.997, 16: 0.999 (docs/experiments.md)."""


def pack_rows(
    document_tokens: ArrayLike, document_images: ArrayLike, num_tokens: int, max_images: int
) -> list[np.ndarray]:
    """Returns rows as arrays of ascending document indices. Raises ValueError for a document larger than a row."""
    tokens, images = np.asarray(document_tokens, np.int64), np.asarray(document_images, np.int64)
    if not len(tokens):
        return []
    if tokens.min() < 1 or tokens.max() > num_tokens or images.max() > max_images:
        raise ValueError(f"every document must have 1..{num_tokens} tokens and at most {max_images} images")
    row_of_document = assign_rows(tokens, images, num_tokens, max_images)
    by_row = np.argsort(row_of_document, kind="stable")
    return np.split(by_row, np.flatnonzero(np.diff(row_of_document[by_row])) + 1)


def assign_rows(tokens: np.ndarray, images: np.ndarray, num_tokens: int, max_images: int) -> np.ndarray:
    """Returns the row of each document; rows are numbered in the order they are filled."""
    order = np.lexsort((-images, -tokens))
    group_starts = np.flatnonzero(np.diff(tokens[order] * (max_images + 1) + images[order], prepend=-1))
    first = order[group_starts]
    left = DocumentsLeft(tokens[first].tolist(), images[first].tolist(), np.diff(group_starts, append=len(order)))
    taken: list[tuple[int, int, int]] = []  # row, group, number of documents
    row = 0
    while left.lengths[-1]:
        taken += [(row, group, count) for group, count in fill_row(left, num_tokens, max_images)]
        row += 1
    rows, groups, counts = np.array(taken).T
    by_group = np.argsort(groups, kind="stable")
    row_of_document = np.empty(len(tokens), np.int64)
    row_of_document[order] = np.repeat(rows[by_group], counts[by_group])
    return row_of_document


def fill_row(left: "DocumentsLeft", num_tokens: int, max_images: int):
    """Takes documents from `left` for one row; yields (group, number of documents)."""
    shortest = left.shortest()
    free_tokens, free_images = num_tokens, max_images
    longest_wanted = num_tokens
    while True:
        length = left.longest(longest_wanted, free_images) or left.longest(free_tokens, free_images)
        if not length:
            return
        images, group = left.group(length, free_images)
        count = 1
        if longest_wanted >= free_tokens:  # any length fits: take many, but leave NEAR_END * shortest tokens
            count = min(left.remaining[group], max(1, (free_tokens - NEAR_END * shortest) // length))
            count = min(count, free_images // images) if images else count
        left.take(group, count, length, images)
        yield group, count
        free_tokens -= count * length
        free_images -= count * images
        if free_tokens < shortest:
            return
        longest_wanted = free_tokens
        if free_tokens <= NEAR_END * shortest:
            longest = left.longest(free_tokens, free_images)
            num_more = -(-free_tokens // longest) if longest else 0
            has_room = num_more * left.fewest_images <= free_images  # else images limit the row: the longest are best
            if num_more > 1 and num_more * shortest <= free_tokens and has_room:
                longest_wanted = -(-free_tokens // num_more)


class DocumentsLeft:
    """Groups of interchangeable documents (same tokens, same images), and the lengths that remain."""

    def __init__(self, lengths: list[int], images: list[int], counts: np.ndarray):
        """Takes the groups in decreasing order of (length, images)."""
        self.remaining: list[int] = counts.tolist()
        self._groups: dict[int, list[tuple[int, int]]] = {}
        by_images = [0] * (max(images) + 1)
        for group, (length, count) in enumerate(zip(lengths, images, strict=True)):
            self._groups.setdefault(length, []).append((count, group))
            by_images[count] |= 1 << length
        self.lengths = list(itertools.accumulate(by_images, operator.or_))
        """Bit n of lengths[i] is set if a document of n tokens and at most i images remains."""
        self._most_images = len(by_images) - 1
        self.fewest_images = min(images)
        """The fewest images of any document, at the start."""
        self._up_to = [(2 << length) - 1 for length in range(lengths[0] + 1)]

    def shortest(self) -> int:
        return (self.lengths[-1] & -self.lengths[-1]).bit_length() - 1

    def longest(self, max_tokens: int, max_images: int) -> int:
        """Returns the length of the longest document within both budgets, 0 if none fits."""
        lengths = self.lengths[min(max_images, self._most_images)]
        if max_tokens < len(self._up_to):
            lengths &= self._up_to[max_tokens]
        return lengths.bit_length() - 1 if lengths else 0

    def group(self, length: int, max_images: int) -> tuple[int, int]:
        """Returns (images, group) of that length with the most images that fit."""
        return next(group for group in self._groups[length] if group[0] <= max_images)

    def take(self, group: int, count: int, length: int, images: int) -> None:
        self.remaining[group] -= count
        if self.remaining[group]:
            return
        groups = self._groups[length]
        groups.remove((images, group))
        fewest_left = min((other for other, _ in groups), default=self._most_images + 1)
        for i in range(images, fewest_left):
            self.lengths[i] &= ~(1 << length)
