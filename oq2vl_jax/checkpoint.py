"""Checkpoints: one Orbax step folder holds everything needed to resume, or to ask the model.

    RUN_DIR/checkpoints/000500/
        model/       {"decoder.norm.scale": array, ...}, float32
        optimizer/   the same for the optimizer state
        loader/      state of the data loader (rows consumed)
        config/      the resolved configuration
        tokenizer/   tokenizer.json and its companions, ready for transformers
        digests/     digests of every file above (checkpoint_digests.py), checked when it is read

A converted checkpoint (convert/) has model/, tokenizer/, digests/, and description/ in place of the others. Orbax
writes to a temporary folder and renames it, so a step folder is whole or absent. Config and tokenizer are plain files.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from oq2vl_jax.checkpoint_digests import check_digests
from oq2vl_jax.config import CheckpointDescription, TrainConfig
from oq2vl_jax.config_files import from_dict
from oq2vl_jax.errors import UserError, hint
from oq2vl_jax.paths import check_local
from oq2vl_jax.trees import from_named_arrays, named_arrays

STEP_DIGITS = 6
ITEMS = ("model", "optimizer", "loader", "config", "tokenizer")
READ_ITEMS = ("model", "config", "description", "tokenizer")
"""Items of a checkpoint that are read to use its weights."""


class FilesHandler(ocp.CheckpointHandler):
    """Copies small files into a checkpoint as they are."""

    def save(self, directory, args: "SaveFiles") -> None:
        for file in args.files if jax.process_index() == 0 else ():
            shutil.copyfile(file, Path(directory) / file.name)

    def restore(self, directory, args=None) -> Path:
        return Path(directory)


@ocp.args.register_with_handler(FilesHandler, for_save=True, for_restore=True)
@dataclass
class SaveFiles(ocp.args.CheckpointArgs):
    files: Iterable[Path] = ()


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"{step:0{STEP_DIGITS}d}"


def find_checkpoint(path: str) -> Path:
    """Finds a step folder: `path` itself, or the newest one of a run directory. Raises UserError if there is none."""
    check_local("checkpoint", path)
    root = Path(path)
    folder = root / "checkpoints" if (root / "checkpoints").is_dir() else root
    steps = [p for p in (root, *folder.glob("*")) if p.name.isdigit() and (p / "_CHECKPOINT_METADATA").exists()]
    if not steps:
        raise UserError(f"{path}: no whole checkpoint here; expected a run directory or one of its checkpoints/NNNNNN.")
    return max(steps, key=lambda p: int(p.name)).absolute()


def open_checkpoint(path: str) -> Path:
    """Finds a checkpoint and checks the digests of the files of READ_ITEMS. Raises UserError if one is damaged."""
    folder = find_checkpoint(path)
    check_digests(folder, READ_ITEMS)
    return folder


def load_train_config(checkpoint: Path) -> TrainConfig | None:
    """Loads the configuration a checkpoint was trained with; None for a converted one."""
    file = checkpoint / "config" / "metadata"
    return from_dict(TrainConfig, json.loads(file.read_text()), where=str(file)) if file.exists() else None


def load_description(checkpoint: Path) -> CheckpointDescription:
    config = load_train_config(checkpoint)
    if config is not None:
        return CheckpointDescription(config.model, config.data.template, origin="trained")
    file = checkpoint / "description" / "metadata"
    if not file.exists():
        raise UserError(f"{checkpoint}: has neither config nor description; it is no checkpoint of this project.")
    return from_dict(CheckpointDescription, json.loads(file.read_text()), where=str(file))


def load_weights(checkpoint: Path, like: Any) -> Any:
    """Loads the model of a checkpoint, placed as `like` (a model of shapes with shardings).

    Raises UserError that names the first four missing, unexpected or mis-shaped parameters.
    """
    expected = named_arrays(like)
    handler = ocp.StandardCheckpointHandler()
    folder = epath.Path(checkpoint / "model")
    saved = handler.metadata(folder).tree
    check_names_and_shapes(
        {name: tuple(array.shape) for name, array in saved.items()},
        {name: tuple(array.shape) for name, array in expected.items()},
        str(checkpoint),
    )
    arrays = handler.restore(folder, args=ocp.args.StandardRestore(expected))
    return from_named_arrays(like, arrays)


def check_names_and_shapes(saved: dict[str, tuple], expected: dict[str, tuple], where: str) -> None:
    problems = [f"{name}: missing{hint(name, set(saved) - set(expected))}" for name in expected if name not in saved]
    problems += [f"{name}: not in this model" for name in saved if name not in expected]
    problems += [
        f"{name}: shape {saved[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in saved and saved[name] != shape
    ]
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise UserError(f"{where}: the checkpoint is of another configuration: {shown}.")
