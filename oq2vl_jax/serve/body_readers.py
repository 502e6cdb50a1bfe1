"""Keeps large bodies in temporary files and parses them in other processes. In the server, megabytes of JSON, base64
and pictures would block all its threads, and it would keep the memory that they took."""

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
"""A reader process is replaced after this many bodies."""
LARGE_BODY = 2**20
"""A body of more bytes is kept in a file."""
NICENESS = 10
"""Lower priority of the reader processes, so that small requests are served first."""


class ReceivedBody:
    """Bytes of a body received so far: in `start`, or, above LARGE_BODY, all of them in the temporary `file`."""

    def __init__(self):
        self.start = bytearray()
        self._stream: tempfile._TemporaryFileWrapper | None = None

    def add(self, part: bytes) -> None:
        """Appends a part. Raises OSError if the disk is full."""
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
    """Pool of reader processes, which start with the first body."""

    def __init__(self):
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None

    def read(self, file: str, limits: Limits) -> Body:
        """Runs read_body on a file in another process. Raises RequestError."""
        with self._lock:
            self._pool = pool = self._pool or new_pool()
        try:
            return pool.submit(read_file, file, limits).result()
        except BrokenProcessPool as problem:  # killed from outside, for example for lack of memory
            with self._lock:
                if self._pool is pool:
                    self._pool = None
            raise RequestError("the process that read this request ended; send it again", 503) from problem

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def new_pool() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # a fork while other threads hold locks can hang
    return ProcessPoolExecutor(
        NUM_READERS, context, initializer=os.nice, initargs=(NICENESS,), max_tasks_per_child=BODIES_PER_READER
    )
