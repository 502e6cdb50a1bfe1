"""Reads parquet files with Polars and reports a damaged one in one sentence, whatever it does to Polars.

Most damage raises a Polars error. Some makes its Rust code panic, which is not a Python Exception. One damaged file in
a few thousand makes it allocate more memory than there is, which ends the process; only another process can report it.
"""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from oq2vl_jax.errors import UserError


@contextlib.contextmanager
def reading_parquet(name: str) -> Iterator[None]:
    """Raises UserError in place of Polars' errors and panics."""
    import polars as pl

    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: cannot be read as parquet: {reason}.") from error


def in_own_process(function: Callable, argument: Any, files: Callable[[], list[str]]) -> Any:
    """Runs function(argument) in its own process. Raises UserError if it dies, naming the file that ends it, if any."""
    try:
        return call(function, argument)
    except BrokenProcessPool as error:
        named = next((file for file in files() if not is_readable(file)), None)
        raise UserError(
            f"{named}: cannot be read as parquet: it ends the process that reads it."
            if named
            else "the process was killed, perhaps for want of memory."
        ) from error


def is_readable(file: str) -> bool:
    try:
        call(read_whole, [file])
    except BrokenProcessPool:
        return False
    return True


def read_whole(files: list[str]) -> None:
    """Reads every file. Raises UserError for the first that cannot be read; a damaged one can end the process."""
    import polars as pl

    for file in files:
        with reading_parquet(file):
            pl.read_parquet(file)


def call(function: Callable, argument: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, argument).result()
