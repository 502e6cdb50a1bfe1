"""Documents to rows under two budgets, tokens and images. Pure numpy, no I/O.

First-fit decreasing: documents from long to short, each into the first row that still has room for its tokens and its
images. Documents of equal length and image count are interchangeable, so a whole group is placed at once: each open
row in turn takes as many as fit, which is what placing them one by one would do.

    row of 10 tokens, documents 6 4 4 3 3      rows: [6 4] [4 3 3]
"""

import numpy as np
from numpy.typing import ArrayLike


def first_fit_decreasing(
    document_tokens: ArrayLike, document_images: ArrayLike, num_tokens: int, max_images: int
) -> list[np.ndarray]:
    """Rows as arrays of document indices, each ascending. Raises ValueError for a document larger than a row."""
    tokens, images = np.asarray(document_tokens, np.int64), np.asarray(document_images, np.int64)
    if not len(tokens):
        return []
    if tokens.min() < 1 or tokens.max() > num_tokens or images.max() > max_images:
        raise ValueError(f"every document must have 1..{num_tokens} tokens and at most {max_images} images")
    row_of_document = assign_rows(tokens, images, num_tokens, max_images)
    by_row = np.argsort(row_of_document, kind="stable")
    return np.split(by_row, np.flatnonzero(np.diff(row_of_document[by_row])) + 1)


def assign_rows(tokens: np.ndarray, images: np.ndarray, num_tokens: int, max_images: int) -> np.ndarray:
    """The row of each document, numbered in the order the rows were opened."""
    row_of_document = np.empty(len(tokens), np.int64)
    order = np.lexsort((-images, -tokens))
    group_starts = np.flatnonzero(np.diff(tokens[order] * (max_images + 1) + images[order], prepend=-1))
    free_tokens, free_images = np.zeros(0, np.int64), np.zeros(0, np.int64)  # of the open rows
    open_rows, num_rows = np.zeros(0, np.int64), 0
    smallest = tokens.min()
    for start, end in zip(group_starts, [*group_starts[1:], len(order)], strict=True):
        size, count = int(tokens[order[start]]), int(images[order[start]])
        room = free_tokens // size
        if count:
            room = np.minimum(room, free_images // count)
        wanted = int(end - start)
        per_row = num_tokens // size if not count else min(num_tokens // size, max_images // count)
        num_new = max(0, -(-(wanted - int(room.sum())) // per_row))
        if num_new:
            free_tokens = np.append(free_tokens, np.full(num_new, num_tokens))
            free_images = np.append(free_images, np.full(num_new, max_images))
            open_rows = np.append(open_rows, np.arange(num_rows, num_rows + num_new))
            room = np.append(room, np.full(num_new, per_row))
            num_rows += num_new
        taken = np.diff(np.minimum(np.cumsum(room), wanted), prepend=0)
        row_of_document[order[start:end]] = np.repeat(open_rows, taken)
        free_tokens, free_images = free_tokens - taken * size, free_images - taken * count
        is_open = free_tokens >= smallest
        if is_open.sum() < 0.9 * len(is_open):
            free_tokens, free_images, open_rows = free_tokens[is_open], free_images[is_open], open_rows[is_open]
    return row_of_document
