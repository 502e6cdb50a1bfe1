"""Checkpoints: one Orbax step folder holds everything needed to go on, or to ask the model.

    RUN_DIR/checkpoints/000500/
        model/       {"decoder.norm.scale": array, ...}, float32
        optimizer/   the same for the optimizer state
        loader/      state of the data loader (rows consumed)
        config/      the resolved configuration
        tokenizer/   tokenizer.json and its companions, ready for transformers
        digests/     of every file above (train/digests.py), compared when it is read

A converted checkpoint (convert/) has model/, tokenizer/ and digests/ as well, and description/ in place of the rest.
Orbax writes beside and renames, so a step folder is whole or it is not there. Config and tokenizer are plain files.
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

from oq2vl_jax.config import CheckpointDescription, TrainConfig
from oq2vl_jax.config_files import from_dict, to_json
from oq2vl_jax.errors import UserError, hint
from oq2vl_jax.paths import check_local
from oq2vl_jax.train.digests import ITEM as DIGESTS
from oq2vl_jax.train.digests import DigestsHandler, SaveDigests, check_digests
from oq2vl_jax.train.failed_saves import HeldErrors
from oq2vl_jax.train.step import TrainState

STEP_DIGITS = 6
ITEMS = ("model", "optimizer", "loader", "config", "tokenizer")
READ_ITEMS = ("model", "config", "description", "tokenizer")
"""Of a checkpoint, what is read by whoever takes its weights."""


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


class Checkpointer:
    """Saves and restores the checkpoints of one run directory."""

    def __init__(self, run_dir: Path, keep: int):
        self._run_dir, self._errors = run_dir, HeldErrors()
        self._manager = ocp.CheckpointManager(
            (run_dir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                step_name_format=ocp.path.step.standard_name_format(step_format_fixed_length=STEP_DIGITS),
            ),
            item_names=(*ITEMS, DIGESTS),
            item_handlers={  # finalized in this order: the digests, of the others, come last
                "model": ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                "loader": ocp.JsonCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
                "tokenizer": FilesHandler(),
                DIGESTS: DigestsHandler(),
            },
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, loader_state: dict, config: TrainConfig, tokenizer: Path) -> None:
        """Starts the save; arrays are copied to the host before this returns, written in the background.

        Raises UserError where this or the save before it found the disk full.
        """
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(named_arrays(state.model)),
            optimizer=ocp.args.StandardSave(named_arrays(state.opt_state)),
            loader=ocp.args.JsonSave(loader_state),
            config=ocp.args.JsonSave(json.loads(to_json(config))),
            tokenizer=SaveFiles(sorted(tokenizer.iterdir())),
            **{DIGESTS: SaveDigests()},
        )
        try:
            self._manager.save(int(state.step), args=items)
        except Exception as error:
            raise self._errors.explained(error, self._run_dir) from error

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict]:
        """The state of `step`, placed as `like` (shapes with shardings), and the loader's state.

        Raises UserError if a file of the checkpoint is not as it was written.
        """
        check_digests(step_folder(self._run_dir, step).absolute(), ITEMS)
        saved = self._manager.restore(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardRestore(named_arrays(like.model)),
                optimizer=ocp.args.StandardRestore(named_arrays(like.opt_state)),
                loader=ocp.args.JsonRestore(),
            ),
        )
        step_array = jax.device_put(jax.numpy.int32(step), like.step.sharding)
        model = from_named_arrays(like.model, saved["model"])
        return TrainState(step_array, model, from_named_arrays(like.opt_state, saved["optimizer"])), saved["loader"]

    def close(self) -> None:
        """Waits for a save under way. Raises UserError where the disk is full."""
        try:
            self._manager.wait_until_finished()
            self._manager.close()
        except Exception as error:
            raise self._errors.explained(error, self._run_dir) from error
        finally:
            self._errors.close()


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"{step:0{STEP_DIGITS}d}"


def find_checkpoint(path: str) -> Path:
    """A step folder: `path` itself, or the newest one of a run directory. Raises UserError if there is none."""
    check_local("checkpoint", path)
    root = Path(path)
    folder = root / "checkpoints" if (root / "checkpoints").is_dir() else root
    steps = [p for p in (root, *folder.glob("*")) if p.name.isdigit() and (p / "_CHECKPOINT_METADATA").exists()]
    if not steps:
        raise UserError(f"{path}: no whole checkpoint here; expected a run directory or one of its checkpoints/NNNNNN.")
    return max(steps, key=lambda p: int(p.name)).absolute()


def open_checkpoint(path: str) -> Path:
    """find_checkpoint(path), its files compared with their digests. Raises UserError if one is damaged."""
    folder = find_checkpoint(path)
    check_digests(folder, READ_ITEMS)
    return folder


def load_train_config(checkpoint: Path) -> TrainConfig | None:
    """The configuration a checkpoint was trained with; None for a converted one."""
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
    """The model of a checkpoint placed as `like` (a model of shapes with shardings).

    Raises UserError that lists every missing, unexpected and mis-shaped parameter.
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


def named_arrays(tree: Any) -> dict[str, Any]:
    """{"decoder.layers.mlp.up_proj.kernel": array, ...} of a model or an optimizer state."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def from_named_arrays(like: Any, arrays: dict[str, Any]) -> Any:
    """Inverse of named_arrays, in the structure of `like`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[path_name(path)], like)


def path_name(path) -> str:
    keys = (jax.tree_util.keystr((key,), simple=True) for key in path)
    return ".".join(key for key in keys if key != "value")
