"""Checkpoints: one Orbax step folder holds everything needed to resume, or to ask the model; adapters need their base.

    RUN_DIR/checkpoints/000500/
        model/       {"decoder.norm.scale": array, ...}, float32; of a run with adapters (config.lora) they alone
        base/        then: the checkpoint that they belong to (weights.py)
        optimizer/   the same for the optimizer state
        ema/         the same for the averaged weights of the trained parts, if the run averages (config.ema)
        loader/      state of the data loader (rows consumed)
        config/      the resolved configuration
        tokenizer/   tokenizer.json and its companions, ready for transformers
        digests/     digests of every file above (checkpoint_digests.py), checked when it is read

A converted checkpoint (convert/) has model/, tokenizer/, digests/, and description/ in place of the others. Orbax
writes to a temporary folder and renames it, so a step folder is whole or absent. Config and tokenizer are plain files.
"""

import hashlib
import json
import shutil
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from oq2vl_jax.checkpoint_digests import check_digests
from oq2vl_jax.config import CheckpointDescription, TrainConfig, Weights
from oq2vl_jax.config_files import from_dict
from oq2vl_jax.errors import UserError, hint
from oq2vl_jax.paths import is_remote
from oq2vl_jax.remote_checkpoints import fetch_checkpoint
from oq2vl_jax.trees import from_named_arrays, named_arrays

STEP_DIGITS = 6
ITEMS = ("model", "base", "optimizer", "ema", "loader", "config", "tokenizer")
READ_ITEMS = ("model", "base", "config", "description", "tokenizer")
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


def find_checkpoint(path: str, items: tuple[str, ...] = READ_ITEMS) -> Path:
    """Finds a step folder: `path` itself, the newest one of a run directory, or that of RUN@STEP.

    Of a remote one, a local copy of these items. Raises UserError if there is none.
    """
    if is_remote(path):
        return fetch_checkpoint(path, items)
    run, _, step = path.rpartition("@")
    is_numbered = bool(run) and step.isdigit() and not Path(path).exists()
    root = Path(run if is_numbered else path)
    folder = root / "checkpoints" if (root / "checkpoints").is_dir() else root
    steps = [p for p in (root, *folder.glob("*")) if p.name.isdigit() and (p / "_CHECKPOINT_METADATA").exists()]
    if not steps:
        raise UserError(f"{path}: no whole checkpoint here; expected a run directory or one of its checkpoints/NNNNNN.")
    if is_numbered:
        kept = sorted({int(p.name) for p in steps})
        steps = [p for p in steps if int(p.name) == int(step)]
        if not steps:
            raise UserError(f"{path}: no checkpoint of step {step}; {run} holds {', '.join(map(str, kept))}.")
    return max(steps, key=lambda p: int(p.name)).absolute()


def open_checkpoint(path: str, weights: Weights = "model", with_optimizer: bool = False) -> Path:
    """Finds a checkpoint and checks the digests of the files of READ_ITEMS, and of the average if weights is ema.

    with_optimizer: its state is read later (load_optimizer). Raises UserError if a file is damaged.
    """
    items = READ_ITEMS if weights == "model" else (*READ_ITEMS, "ema")
    folder = find_checkpoint(path, (*items, "optimizer") if with_optimizer else items)
    check_digests(folder, items)
    return folder


def identity_of(checkpoint: Path) -> str:
    """Returns what tells a checkpoint from another one at the same place."""
    return hashlib.sha256((checkpoint / "_CHECKPOINT_METADATA").read_bytes()).hexdigest()[:16]


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


def load_optimizer(checkpoint: Path, like: Any) -> Any:
    """Loads the optimizer's state of a checkpoint, placed as `like`. Raises UserError as weights.load_weights does."""
    if not (checkpoint / "optimizer").is_dir():
        raise UserError(f"{checkpoint}: holds no optimizer state to start from; leave out --init-optimizer.")
    check_digests(checkpoint, ("optimizer",))
    states = (like,)  # the first of what train/checkpointer.py saves
    return from_named_arrays(states, load_arrays(checkpoint, "optimizer", named_arrays(states), {"0"}))[0]


def check_has_ema(checkpoint: Path) -> None:
    if not (checkpoint / "ema").is_dir():
        raise UserError(f"{checkpoint}: holds no averaged weights; the run had no --ema.decay. Take the model's.")


def saved_shapes(checkpoint: Path, item: str) -> dict[str, tuple]:
    saved = ocp.StandardCheckpointHandler().metadata(epath.Path(checkpoint / item)).tree
    return {name: tuple(array.shape) for name, array in saved.items()}


def load_arrays(checkpoint: Path, item: str, expected: dict[str, Any], parts: Container[str]) -> dict[str, Any]:
    """Loads the arrays of an item by name. Those of other parts than `parts` (the first word of a name) stay unread.

    Raises UserError as weights.load_weights does.
    """
    saved = {name: shape for name, shape in saved_shapes(checkpoint, item).items() if name.split(".")[0] in parts}
    check_names_and_shapes(saved, {name: tuple(array.shape) for name, array in expected.items()}, str(checkpoint))
    if not expected:
        return {}
    arguments = ocp.args.PyTreeRestore(
        expected, restore_args=ocp.checkpoint_utils.construct_restore_args(expected), partial_restore=True
    )
    return ocp.PyTreeCheckpointHandler().restore(epath.Path(checkpoint / item), args=arguments)


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
