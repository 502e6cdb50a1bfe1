"""Brings a whole remote folder into the cache, such as that of the benchmarks."""

from pathlib import Path

from oq2vl_jax.errors import UserError
from oq2vl_jax.paths import file_version, join
from oq2vl_jax.remote.cache import key_of, the_cache
from oq2vl_jax.remote.transfer import download_tree, list_tree


def local_copy(url: str) -> Path:
    """Returns a local copy of a remote folder as it is now. Raises UserError if it is empty or does not fit."""
    files = list_tree(url)
    if not files:
        raise UserError(f"{url}: no such folder, or an empty one.")
    versions = [(name, file_version(join(url, name))) for name in sorted(files)]
    return the_cache().place(key_of(url, versions), sum(files.values()), lambda to: download_tree(url, files, to))
