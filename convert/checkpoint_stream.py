"""Writes and reads Orbax checkpoints one parameter at a time, so that a conversion need not hold a whole model.

Orbax passes the leaves of a tree to a type handler. LazyArray is a leaf whose value is computed when the handler writes
it, and freed when it is on disk. The result is an ordinary checkpoint: train and generate read it like any other.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import type_handlers

from oq2vl_jax.checkpoint import FilesHandler, SaveFiles, check_has_ema, saved_shapes, step_folder
from oq2vl_jax.checkpoint_digests import DigestsHandler, SaveDigests
from oq2vl_jax.config import CheckpointDescription, Weights
from oq2vl_jax.errors import UserError
from oq2vl_jax.model.clip_config import ClipDescription
from oq2vl_jax.paths import check_local
from oq2vl_jax.weights import find_base, load_adapters, recorded_base


class LazyArray:
    """A float32 parameter of a given shape. `make` computes it on demand."""

    dtype = np.dtype(np.float32)

    def __init__(self, shape: tuple[int, ...], make: Callable[[], np.ndarray]):
        self.shape, self.make = shape, make

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class LazyArrayHandler(type_handlers.NumpyHandler):
    """Computes, writes and frees one array after another."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values: Any, infos, args=None):
        args = args or [ocp.SaveArgs()] * len(values)
        for value, info, arg in zip(values, infos, args, strict=True):
            array = value.make()
            assert (array.shape, array.dtype) == (value.shape, value.dtype), (info.name, array.shape, array.dtype)
            for written in await super().serialize([array], [info], [arg]):
                written.result()
            del array
        return []


def save_checkpoint(
    out: Path, parameters: dict[str, LazyArray], description: CheckpointDescription | ClipDescription, tokenizer: Path
) -> None:
    """Writes weights, description, tokenizer and digests to OUT/checkpoints/000000. `out` appears when complete."""
    registry = type_handlers.create_type_handler_registry((LazyArray, LazyArrayHandler()))
    handler = ocp.CompositeCheckpointHandler(
        model=ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        description=ocp.JsonCheckpointHandler(),
        tokenizer=FilesHandler(),
        digests=DigestsHandler(),
    )
    with new_folder(out) as partial, ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            step_folder(partial, 0).absolute(),
            args=ocp.args.Composite(
                model=ocp.args.PyTreeSave(parameters),
                description=ocp.args.JsonSave(dataclasses.asdict(description)),
                tokenizer=SaveFiles(sorted(tokenizer.iterdir())),
                digests=SaveDigests(),
            ),
        )


class CheckpointReader:
    """Reads the weights of a checkpoint one parameter at a time. `shapes`: parameter name -> shape."""

    def __init__(self, checkpoint: Path, weights: Weights = "model"):
        """Raises UserError if weights is ema, but the checkpoint holds none."""
        self._handler = ocp.PyTreeCheckpointHandler()
        self._base = self._adapters = None
        if recorded_base(checkpoint) is not None:
            self._base, self._adapters = CheckpointReader(find_base(checkpoint)), load_adapters(checkpoint, weights)
            self.shapes = self._base.shapes
            return
        self.shapes = saved_shapes(checkpoint, "model")
        self._folders = dict.fromkeys(self.shapes, epath.Path(checkpoint / "model"))
        if weights == "ema":
            check_has_ema(checkpoint)
            self._folders |= dict.fromkeys(saved_shapes(checkpoint, "ema"), epath.Path(checkpoint / "ema"))

    def read(self, name: str) -> np.ndarray:
        """Reads one parameter, with its adapter merged. Raises UserError if the checkpoint is damaged."""
        if self._base is not None and self._adapters is not None:
            array, adapter = self._base.read(name), self._adapters.get(name)
            return array if adapter is None else adapter.added_to_host(array)
        args = ocp.args.PyTreeRestore(
            item={name: 0}, restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)}, partial_restore=True
        )
        try:
            return self._handler.restore(self._folders[name], args=args)[name]
        except ValueError as error:  # tensorstore's error for truncated or changed bytes
            raise UserError(f"{self._folders[name]}: {name} cannot be read ({str(error).splitlines()[0]}).") from error


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields the folder `out`.partial, renames it to `out` when the block succeeds and deletes it if the block fails.

    Raises UserError if `out` is remote, a file, or a folder that is not empty.
    """
    check_is_free(out)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if out.is_dir():
            out.rmdir()
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_is_free(out: Path) -> None:
    check_local("--out", str(out).replace(":/", "://"))  # undo pathlib, which turns :// into :/
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(
            f"--out {out} is {'a folder that is not empty' if out.is_dir() else 'a file'}; choose another folder."
        )
