"""File formats of samples, one a module. A new module that binds FORMAT is read by packing, offline and online."""

import functools
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from oq2vl_jax.data.samples.formats.format import Format, Reading
from oq2vl_jax.data.samples.shards import Sample
from oq2vl_jax.errors import UserError


@functools.cache
def formats() -> dict[str, Format]:
    """Returns the formats by the names of their modules, the fallback last."""
    names = sorted(file.stem for file in Path(__file__).parent.glob("*.py") if file.stem not in ("__init__", "format"))
    modules = {name: importlib.import_module(f"{__name__}.{name}").FORMAT for name in names}
    return dict(sorted(modules.items(), key=lambda item: item[1].is_fallback))


def format_name(path: str) -> str:
    """Returns the name of the format of a file, or of an input of Format.split."""
    return next(name for name, format in formats().items() if format.is_fallback or format.matches(path))


def format_of(path: str) -> Format:
    return formats()[format_name(path)]


def parts_of(path: str, samples_per_part: int) -> list[str]:
    """Returns the inputs that a file is read by: parts of it, or the file itself."""
    split = format_of(path).split
    return [path] if split is None else split(path, samples_per_part)


def version_beside(inputs: Sequence[str], reading: Reading) -> str:
    """Returns a digest of the files that inputs of one format name outside of themselves; "" if they name none."""
    version = format_of(inputs[0]).version_beside
    return version(list(inputs), reading) if version is not None else ""


def read_whole_samples(path: str) -> Iterator[Sample]:
    """Yields the samples of a file that holds its pictures. Raises UserError for a format that only names them."""
    if not format_of(path).holds_pictures:
        raise UserError(
            f"{path}: its pictures lie in files of their own; this command reads tars and parquet files that hold them."
        )
    yield from format_of(path).read(path, Reading())
