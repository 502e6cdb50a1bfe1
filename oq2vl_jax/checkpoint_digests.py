"""Writes digests of a checkpoint's files with it and checks them when it is read, so that a flipped bit is an error.

    checkpoints/000500/digests/digests.json      {"algorithm": "xxh3_128", "files": {"model/d/0cf1..": [bytes, digest]}}

Orbax stores arrays as compressed chunks without checksums: 41 of 60 flipped bits changed weights silently. The digests
cover every file of the checkpoint's items (model, optimizer, ...); they are written before Orbax renames the step
folder. XXH3 runs at memory speed; most of the time goes into reading the files.
"""

import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from oq2vl_jax.digests import digest_of, digest_of_text
from oq2vl_jax.errors import UserError

ITEM, FILE, ALGORITHM = "digests", "digests.json", "xxh3_128"
METADATA = "_CHECKPOINT_METADATA"
MARKER = "commit_success.txt"
"""Orbax's own marker of a complete folder; it says nothing about the other files, so it has no digest."""
UNFINISHED = ".orbax-checkpoint-tmp"


class DigestsHandler(ocp.CheckpointHandler):
    """Digests the other items; it is finalized last, when they are whole."""

    def save(self, directory: Any, args: "SaveDigests") -> None:
        del directory, args

    def restore(self, directory: Any, args: Any = None) -> Path:
        del args
        return Path(directory)

    def finalize(self, directory: Any) -> None:
        step = Path(directory).parent
        items = [path for path in step.iterdir() if path.is_dir() and path.name.split(".")[0] != ITEM]
        unfinished = [path.name for path in items if UNFINISHED in path.name]
        assert not unfinished, f"Orbax finalized the digests before {unfinished}"
        write_digests(step, [path.name for path in items], Path(directory) / FILE)


@ocp.args.register_with_handler(DigestsHandler, for_save=True, for_restore=True)
@dataclass
class SaveDigests(ocp.args.CheckpointArgs):
    pass


def write_digests(step: Path, items: Iterable[str], target: Path) -> None:
    """Writes the digests of every file of these items of a checkpoint to `target`."""
    files = sorted(str(path.relative_to(step)) for item in items for path in files_of(step / item))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(lambda name: digest_of(step / name), files))
    content = {"algorithm": ALGORITHM, "files": dict(zip(files, digests, strict=True))}
    target.write_text(json.dumps(content | {"of_this_file": digest_of_list(content["files"])}, indent=1) + "\n")


def check_digests(step: Path, items: Iterable[str]) -> None:
    """Raises UserError unless every file of these items that has a digest is present and unchanged.

    A checkpoint older than the digests passes, with a line on standard error.
    """
    check_metadata(step)
    listed = read_digests(step)
    if listed is None:
        print(f"{step}: no digests; written before there were any, its files are read unchecked.", file=sys.stderr)
        return
    chosen = set(items)
    wanted = {name: tuple(entry) for name, entry in listed.items() if name.split("/")[0] in chosen}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(lambda name: digest_of(step / name) if (step / name).is_file() else None, wanted)
        changed = [name for name, digest in zip(wanted, digests, strict=True) if digest != wanted[name]]
    if changed:
        is_there = (step / changed[0]).is_file()
        raise damaged(step, changed[0], "is not as it was written" if is_there else "is missing")


def check_metadata(step: Path) -> None:
    """Raises UserError unless Orbax's own file, which Orbax rewrites, is missing, empty or a JSON object."""
    content = (step / METADATA).read_bytes() if (step / METADATA).exists() else b""
    try:
        is_right = not content or isinstance(json.loads(content), dict)
    except ValueError:
        is_right = False
    if not is_right:
        raise damaged(step, METADATA, "is not as it was written")


def read_digests(step: Path) -> dict[str, list] | None:
    """Returns {file: [bytes, digest]}; None for a checkpoint without it. Raises UserError if the list is damaged."""
    file = step / ITEM / FILE
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_bytes())
        files = content["files"]
        if content["of_this_file"] != digest_of_list(files) or content["algorithm"] != ALGORITHM:
            raise ValueError("its own digest differs")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(step, f"{ITEM}/{FILE}", "is not as it was written") from error
    return files


def damaged(step: Path, name: str, problem: str) -> UserError:
    """Returns the error of a damaged checkpoint, which names the file and how to go on."""
    others = [path for path in step.parent.glob("*") if path.name.isdigit() and path.name != step.name]
    before = max((path for path in others if int(path.name) < int(step.name)), key=lambda p: int(p.name), default=None)
    way_out = (
        f"copy it again, or remove the folder {step} to go on from {before.name}, the newest one before it"
        if before
        else "copy it again; there is no earlier checkpoint beside it"
    )
    return UserError(f"{step}: the checkpoint is damaged: {name} {problem}; {way_out}.")


def digest_of_list(files: dict[str, Any]) -> str:
    return digest_of_text(json.dumps({name: list(entry) for name, entry in sorted(files.items())}))


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != MARKER]
