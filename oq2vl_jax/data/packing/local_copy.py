"""Brings a remote packed folder into the cache, as a local folder of the same shape."""

import functools
from pathlib import Path
from typing import Any

from oq2vl_jax.data.packing.manifest import parse_manifest
from oq2vl_jax.digests import digest_of
from oq2vl_jax.errors import UserError
from oq2vl_jax.paths import exists, file_version, is_remote, join, list_names, read_text
from oq2vl_jax.remote.cache import Wanted, cache_folder, key_of, the_cache
from oq2vl_jax.remote.transfer import download_tree


def local_folder(path: str) -> Path:
    """Returns the packed folder itself, or a local copy of a remote one, which this process fetches once.

    Raises UserError if it is no packed folder, does not fit the cache, or arrived as something else than was packed.
    """
    return fetched(path, cache_folder()) if is_remote(path) else Path(path)


@functools.cache
def fetched(url: str, cache: Path) -> Path:
    """cache: the folder in use, so that another one fetches again."""
    del cache
    manifest_url = join(url, "manifest.json")
    if not exists(manifest_url):
        raise UserError(f"data.sources: {url} has no manifest.json; pack it with python -m oq2vl_jax.data.pack.")
    text = read_text(manifest_url)
    entries = parse_manifest(text, manifest_url)["files"]
    wanted = {entry["file"]: wanted_of(url, entry) for entry in entries if entry["rows"]}
    files = the_cache().files(list(wanted.values()))

    def fill(folder: Path) -> None:
        (folder / "manifest.json").write_text(text)
        tokenizer = [f"tokenizer/{name}" for name in sorted(list_names(join(url, "tokenizer")))]
        settings = ["settings.json"] if exists(join(url, "settings.json")) else []
        download_tree(url, [*tokenizer, *settings], folder)
        for name, one in wanted.items():
            (folder / name).symlink_to(Path("../../files") / files[one.key].name)

    return the_cache().place(key_of(url, text), len(text), fill)


def wanted_of(url: str, entry: dict[str, Any]) -> Wanted:
    """Returns what to fetch. The key is the digest of the content; for rows packed before there were digests, it is
    the place and what the store says of the version."""
    remote = join(url, entry["file"])
    if "xxh3" not in entry:
        version = file_version(remote)
        return Wanted(key_of(remote, version), remote, int(version[0]))
    expected = (entry["bytes"], entry["xxh3"])

    def check(copy: Path) -> None:
        if digest_of(copy) != expected:
            raise UserError(
                f"{remote} is not what was packed: another file, or damaged; upload it or pack the shards again."
            )

    return Wanted(f"{entry['xxh3']}-{entry['bytes']}", remote, entry["bytes"], check)
