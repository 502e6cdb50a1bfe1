"""The pictures that a sample names: files of a folder, read by name."""

import errno
import os
from collections.abc import Callable, Iterable
from typing import Any

from oq2vl_jax import paths
from oq2vl_jax.data.samples.images import ImageError
from oq2vl_jax.data.samples.shards import Sample
from oq2vl_jax.errors import UserError

MAX_SHOWN = 120
"""Characters of a name in a message; a cell can hold anything."""


def with_pictures(
    sample: Sample, cells: Callable[[], Iterable[Any]], read: Callable[[Any], tuple[bytes, list[str]]]
) -> Sample:
    """Returns the sample with the pictures that `read` gives for each of the cells, or with the first problem."""
    try:
        found = [read(cell) for cell in cells()]
    except ImageError as problem:
        return sample._replace(problem=problem.reason)
    notes = tuple(note for _, notes in found for note in notes)
    return sample._replace(images=[data for data, _ in found], notes=sample.notes + notes)


def picture_in_folder(name: str, folder: str | None, key: str) -> tuple[bytes, list[str]]:
    """Returns the contents of a picture and notes on it.

    Raises ImageError for a name that is a URL, leads outside or is missing, and UserError without a folder.
    """
    if "://" in name:
        raise ImageError("image_is_a_url", name)
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ImageError("image_outside_folder", name)
    if folder is None:
        raise UserError(
            f"entry {key} names the image {name[:MAX_SHOWN]!r}; give the folder of the images with --images."
        )
    try:
        with paths.open_input(paths.join(folder, name)) as file:
            return file.read(), ["image_linked_from_outside"] if leads_outside(folder, name) else []
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, UnicodeEncodeError) as error:
        raise ImageError("image_missing", name) from error
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise ImageError("image_missing", name) from error


def leads_outside(folder: str, name: str) -> bool:
    """Returns whether a symbolic link leads outside. It is read all the same, as picture folders often hold links."""
    if paths.is_remote(folder):
        return False
    return not os.path.realpath(os.path.join(folder, name)).startswith(os.path.realpath(folder) + os.sep)
