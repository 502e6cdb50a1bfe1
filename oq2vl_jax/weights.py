"""Loads the weights of a checkpoint, those of a run with adapters merged into its base.

A run with adapters (config.lora) saves them alone, and beside them which checkpoint they belong to:

    RUN_DIR/checkpoints/000500/base/metadata     {"checkpoint": "/data/captions/checkpoints/001000", "digest": ".."}

The digest covers the files of the base's weights, so a base that changed is an error. It is looked for where it was,
then where init_from names it; a copy there will do. A base may have adapters itself.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from oq2vl_jax.checkpoint import (
    check_has_ema,
    find_checkpoint,
    load_arrays,
    load_train_config,
    open_checkpoint,
    saved_shapes,
)
from oq2vl_jax.checkpoint_digests import digest_of_list, files_of, read_digests
from oq2vl_jax.config import Weights
from oq2vl_jax.digests import digest_of
from oq2vl_jax.errors import UserError
from oq2vl_jax.model.adapters import merged_kernel
from oq2vl_jax.trees import from_named_arrays, named_arrays

OF_WEIGHTS = ("model", "base")


class Base(NamedTuple):
    """checkpoint: its folder, absolute; digest: of the files of its weights."""

    checkpoint: str
    digest: str


def base_of(folder: Path) -> Base:
    """Returns what the adapters of a run that starts from a checkpoint record about it."""
    listed = read_digests(folder)
    if listed is None:  # written before there were digests
        files = [file for item in OF_WEIGHTS if (folder / item).is_dir() for file in files_of(folder / item)]
        listed = {str(file.relative_to(folder)): list(digest_of(file)) for file in files}
    chosen = {name: entry for name, entry in listed.items() if name.split("/")[0] in OF_WEIGHTS}
    return Base(str(folder.absolute()), digest_of_list(chosen))


def recorded_base(checkpoint: Path) -> Base | None:
    """Returns the base of a checkpoint of adapters; None for one that holds a whole model."""
    file = checkpoint / "base" / "metadata"
    if not file.is_file():
        return None
    try:
        return Base(**json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); copy the checkpoint again.") from error


def find_base(checkpoint: Path) -> Path:
    """Returns the folder of the base of a checkpoint of adapters, checked. It is looked for where it was, then where
    init_from names it. Raises UserError if it is gone or another one."""
    recorded, config = recorded_base(checkpoint), load_train_config(checkpoint)
    assert recorded is not None
    places = [recorded.checkpoint, *([config.init_from] if config is not None and config.init_from else [])]
    others = []
    for place in places:
        try:
            folder = find_checkpoint(place)
        except UserError:
            continue
        if base_of(folder).digest == recorded.digest:
            return open_checkpoint(str(folder))
        others.append(folder)
    if others:
        raise UserError(
            f"{checkpoint}: holds adapters of {recorded.checkpoint}, and {others[0]} has other weights; they would not "
            "fit. Bring back the checkpoint that the run started from."
        )
    raise UserError(
        f"{checkpoint}: holds adapters of {recorded.checkpoint}, which is gone; bring that checkpoint back, or run "
        f"where init_from = {places[-1]} exists."
    )


def load_weights(checkpoint: Path, like: Any, weights: Weights = "model") -> Any:
    """Loads the model of a checkpoint, placed as `like` (a model, or parts of one, of shapes with shardings).

    weights: ema takes the averaged ones where the run averaged. Raises UserError that names the first four missing,
    unexpected or mis-shaped parameters, or says that there is no average.
    """
    if recorded_base(checkpoint) is None:
        return load_whole(checkpoint, like, weights)
    model = named_arrays(load_weights(find_base(checkpoint), like))
    for name, adapter in load_adapters(checkpoint, weights).items():
        if name in model:
            model[name] = adapter.added_to(model[name])
    return from_named_arrays(like, model)


def load_whole(checkpoint: Path, like: Any, weights: Weights) -> Any:
    expected = named_arrays(like)
    parts = {name.split(".")[0] for name in expected}
    if weights == "model":
        return from_named_arrays(like, load_arrays(checkpoint, "model", expected, parts))
    check_has_ema(checkpoint)
    averaged = {name: expected[name] for name in saved_shapes(checkpoint, "ema") if name in expected}
    others = {name: array for name, array in expected.items() if name not in averaged}
    arrays = load_arrays(checkpoint, "ema", averaged, parts)
    return from_named_arrays(like, arrays | load_arrays(checkpoint, "model", others, {n.split(".")[0] for n in others}))


class Adapter(NamedTuple):
    """float32 arrays [in, rank] and [rank, out], or stacks of them."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    def added_to(self, kernel: jax.Array) -> jax.Array:
        """Returns the kernel with the adapter, placed as it is."""
        add = jax.jit(lambda kernel, a, b: merged_kernel(kernel, a, b, self.scale), out_shardings=kernel.sharding)
        return add(kernel, self.a, self.b)

    def added_to_host(self, kernel: np.ndarray) -> np.ndarray:
        """Returns the float32 kernel with the adapter, one layer of a stack after another."""
        if kernel.ndim > 2:
            layers = zip(kernel, self.a, self.b, strict=True)
            return np.stack([Adapter(a, b, self.scale).added_to_host(layer) for layer, a, b in layers])
        return kernel + self.scale * (self.a @ self.b)


def load_adapters(checkpoint: Path, weights: Weights = "model") -> dict[str, Adapter]:
    """Returns {name of a kernel: its adapter} of a checkpoint of adapters. Raises UserError if weights is ema, but
    the checkpoint holds none."""
    if weights == "ema":
        check_has_ema(checkpoint)
    config = load_train_config(checkpoint)
    assert config is not None
    assert config.lora.rank is not None
    item = "ema" if weights == "ema" else "model"
    names = list(saved_shapes(checkpoint, item))
    args = ocp.args.PyTreeRestore(
        item=dict.fromkeys(names, 0), restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    )
    arrays = ocp.PyTreeCheckpointHandler().restore(epath.Path(checkpoint / item), args=args)
    scale = config.lora.alpha / config.lora.rank
    kernels = [name.removesuffix(".lora_a") for name in names if name.endswith(".lora_a")]
    return {f"{name}.kernel": Adapter(arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"], scale) for name in kernels}
