"""Saves the state of a run and restores it."""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from oq2vl_jax.checkpoint import ITEMS, STEP_DIGITS, FilesHandler, SaveFiles, step_folder
from oq2vl_jax.checkpoint_digests import ITEM as DIGESTS
from oq2vl_jax.checkpoint_digests import DigestsHandler, SaveDigests, check_digests
from oq2vl_jax.config import TrainConfig
from oq2vl_jax.config_files import to_json
from oq2vl_jax.model.adapters import without_adapters
from oq2vl_jax.train.failed_saves import HeldErrors
from oq2vl_jax.train.parts import split_trainable
from oq2vl_jax.train.remote_run_dir import RemoteRunDir
from oq2vl_jax.train.step import TrainState
from oq2vl_jax.trees import from_named_arrays, named_arrays
from oq2vl_jax.weights import Base, find_base, load_weights


class Checkpointer:
    """Saves and restores the checkpoints of one run directory. uploads: of a remote one, in the first process."""

    def __init__(self, run_dir: Path, keep: int, uploads: RemoteRunDir | None = None):
        self._run_dir, self._errors, self._uploads = run_dir, HeldErrors(), uploads
        self._manager = ocp.CheckpointManager(
            (run_dir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                step_name_format=ocp.path.step.standard_name_format(step_format_fixed_length=STEP_DIGITS),
            ),
            item_names=(*ITEMS, DIGESTS),
            item_handlers={  # finalized in this order; the digests of the other items come last
                "model": ocp.StandardCheckpointHandler(),
                "base": ocp.JsonCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                "ema": ocp.StandardCheckpointHandler(),
                "loader": ocp.JsonCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
                "tokenizer": FilesHandler(),
                DIGESTS: DigestsHandler(),
            },
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(
        self, state: TrainState, loader_state: dict, config: TrainConfig, tokenizer: Path, base: Base | None = None
    ) -> None:
        """Starts a save: copies the arrays to the host before it returns, and writes them in the background.

        base: of a run with adapters. Raises UserError if this save or the previous one could not write because the disk
        is full or forbidden, or could not be uploaded.
        """
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(named_arrays(model_item(state.model, config))),
            **({} if base is None else {"base": ocp.args.JsonSave(base._asdict())}),
            optimizer=ocp.args.StandardSave(named_arrays(optimizer_item(state))),
            **({} if state.ema is None else {"ema": ocp.args.StandardSave(named_arrays(state.ema))}),
            loader=ocp.args.JsonSave(loader_state),
            config=ocp.args.JsonSave(json.loads(to_json(config))),
            tokenizer=SaveFiles(sorted(tokenizer.iterdir())),
            **{DIGESTS: SaveDigests()},
        )
        problem = self._uploads.problem() if self._uploads is not None else None  # waits: what is not uploaded stays
        try:
            self._manager.save(int(state.step), args=items)
        except Exception as error:
            raise self._errors.explained(error, self._run_dir) from error
        if problem is not None:
            raise problem  # this checkpoint is saved here, and the same command uploads it
        if self._uploads is not None:
            self._uploads.after_save(self._manager.is_saving_in_progress)

    def restore(self, step: int, like: TrainState, config: TrainConfig) -> tuple[TrainState, dict]:
        """Returns the state of `step`, sharded like `like` (shapes with shardings), and the loader's state.

        The base of adapters comes from its own checkpoint. Raises UserError if a file of the checkpoint differs from
        its digest.
        """
        folder = step_folder(self._run_dir, step).absolute()
        check_digests(folder, ITEMS)
        saved = self._manager.restore(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardRestore(named_arrays(model_item(like.model, config))),
                optimizer=ocp.args.StandardRestore(named_arrays(optimizer_item(like))),
                **({} if like.ema is None else {"ema": ocp.args.StandardRestore(named_arrays(like.ema))}),
                loader=ocp.args.JsonRestore(),
            ),
        )
        base = {} if config.lora.rank is None else load_weights(find_base(folder), without_adapters(like.model))
        opt_state, spikes, _ = from_named_arrays(optimizer_item(like), saved["optimizer"])
        return TrainState(
            jax.device_put(jax.numpy.int32(step), like.step.sharding),
            from_named_arrays(like.model, named_arrays(base) | saved["model"]),
            opt_state,
            from_named_arrays(like.ema, saved["ema"]) if like.ema is not None else None,
            spikes,
        ), saved["loader"]

    def close(self) -> None:
        """Waits for a running save. Raises UserError if the disk is full or forbidden."""
        try:
            self._manager.wait_until_finished()
            self._manager.close()
        except Exception as error:
            raise self._errors.explained(error, self._run_dir) from error
        finally:
            self._errors.close()


def model_item(model: Any, config: TrainConfig) -> Any:
    """What the item "model" holds: the model, or its adapters alone."""
    return model if config.lora.rank is None else split_trainable(model, config)[0]


def optimizer_item(state: TrainState) -> tuple[Any, Any, Any]:
    """What the item "optimizer" holds; the step, so that it is not empty for an optimizer without a state."""
    return state.opt_state, state.spikes, state.step
