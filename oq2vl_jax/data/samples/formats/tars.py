"""WebDataset tars (data/samples/shards.py); every file that no other format takes is read as one."""

import numpy as np

from oq2vl_jax.data.samples.formats.format import Format, Reading
from oq2vl_jax.data.samples.shards import Sample, read_samples, sample_of
from oq2vl_jax.data.samples.tars import key_offsets, read_key


def offsets(path: str) -> np.ndarray:
    return np.array(key_offsets(path), np.int64).reshape(-1, 2)


def read_one(path: str, begin: int, end: int, reading: Reading) -> Sample:
    return sample_of(read_key(path, begin, end))


FORMAT = Format(
    matches=lambda path: path.endswith(".tar"),
    read=lambda path, reading: read_samples(path),
    offsets=offsets,
    read_one=read_one,
    is_fallback=True,
)
