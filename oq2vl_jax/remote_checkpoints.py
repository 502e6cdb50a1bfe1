"""Brings a remote checkpoint into the cache. It is whole if it has Orbax's metadata, which is uploaded last."""

from pathlib import Path

from oq2vl_jax.checkpoint_digests import ITEM as DIGESTS
from oq2vl_jax.checkpoint_digests import METADATA, check_digests
from oq2vl_jax.errors import UserError
from oq2vl_jax.paths import exists, file_version, join, list_names
from oq2vl_jax.remote.cache import key_of, the_cache
from oq2vl_jax.remote.transfer import download_tree, list_tree


def fetch_checkpoint(path: str, items: tuple[str, ...]) -> Path:
    """Returns a local copy of these items of a remote checkpoint: `path` itself, the newest one of a run directory, or
    that of RUN@STEP. Raises UserError if there is none, or if a file of it is missing or damaged."""
    url = find_remote(path)
    files = {name: size for name, size in list_tree(url).items() if name.split("/")[0] in (*items, METADATA, DIGESTS)}
    step = url.rsplit("/", 1)[-1]

    def fill(folder: Path) -> None:
        download_tree(url, files, folder / step)
        try:
            check_digests(folder / step, items)
        except UserError as error:
            raise UserError(str(error).replace(str(folder / step), url)) from error

    key = key_of(url, file_version(join(url, METADATA)), sorted(files.items()))
    return the_cache().place(key, sum(files.values()), fill) / step


def find_remote(path: str) -> str:
    """Returns the address of a whole checkpoint, as checkpoint.find_checkpoint finds a local one."""
    name = path.rstrip("/").rsplit("/", 1)[-1]
    if name.isdigit() and exists(join(path, METADATA)):
        return path.rstrip("/")
    run, _, number = path.rpartition("@")
    is_numbered = bool(run) and number.isdigit()
    steps = whole_steps(run if is_numbered else path)
    if not steps:
        raise UserError(f"{path}: no whole checkpoint here; expected a run directory or one of its checkpoints/NNNNNN.")
    if is_numbered and int(number) not in steps:
        raise UserError(f"{path}: no checkpoint of step {number}; {run} holds {', '.join(map(str, sorted(steps)))}.")
    return steps[int(number) if is_numbered else max(steps)]


def whole_steps(run_dir: str) -> dict[int, str]:
    """Returns {step: address} of the whole checkpoints of a remote run directory, or of its folder checkpoints/."""
    for folder in (join(run_dir, "checkpoints"), run_dir):
        names = [name for name in list_names(folder) if name.isdigit()]
        steps = {int(name): join(folder, name) for name in names if exists(join(join(folder, name), METADATA))}
        if steps:
            return steps
    return {}
