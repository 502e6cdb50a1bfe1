"""Large bodies lie in a file and are read in processes of their own: JSON, base64 and pictures of megabytes would keep
all threads of the server waiting, and the memory that they held would stay with it."""

import multiprocessing
import os
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from oq2vl_jax.serve.answers import RequestError
from oq2vl_jax.serve.body import Body, Limits, read_body

NUM_READERS = 2
BODIES_PER_READER = 100
"""Then it is replaced by a fresh one."""
LARGE_BODY = 2**20
"""From here on it lies in a file."""
NICENESS = 10
"""Whoever sends megabytes waits for those who do not."""


class ReceivedBody:
    """The bytes of a body so far: in `start`, or all of them in the temporary `file` when they have become many."""

    def __init__(self):
        self.start = bytearray()
        self._stream: tempfile._TemporaryFileWrapper | None = None

    def add(self, part: bytes) -> None:
        """Raises OSError where the disk is full."""
        if self._stream is None and len(self.start) + len(part) <= LARGE_BODY:
            self.start += part
            return
        if self._stream is None:
            self._stream = tempfile.NamedTemporaryFile(prefix="oq2vl_jax_body_", buffering=0)  # noqa: SIM115
            self._stream.write(self.start)
            self.start = bytearray()
        self._stream.write(part)

    @property
    def file(self) -> str | None:
        return self._stream.name if self._stream else None

    def __enter__(self) -> "ReceivedBody":
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()


def read_file(file: str, limits: Limits) -> Body:
    return read_body(Path(file).read_bytes(), limits)


class BodyReaders:
    """Starts its processes with the first body."""

    def __init__(self):
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None

    def read(self, file: str, limits: Limits) -> Body:
        """read_body of a file, in another process. Raises RequestError."""
        with self._lock:
            self._pool = pool = self._pool or new_pool()
        try:
            return pool.submit(read_file, file, limits).result()
        except BrokenProcessPool as problem:  # ended from outside, for want of memory say
            with self._lock:
                if self._pool is pool:
                    self._pool = None
            raise RequestError("the process that read this request ended; send it again", 503) from problem

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def new_pool() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # a fork of threads that hold locks would hang
    return ProcessPoolExecutor(
        NUM_READERS, context, initializer=os.nice, initargs=(NICENESS,), max_tasks_per_child=BODIES_PER_READER
    )
