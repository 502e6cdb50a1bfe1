"""Opens what can be asked: a checkpoint, an export of convert.to_hf, or an id of the hub."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from oq2vl_jax import own_code
from oq2vl_jax.checkpoint import identity_of, load_description, open_checkpoint
from oq2vl_jax.command import bridge
from oq2vl_jax.config import CheckpointDescription, ModelConfig, Weights
from oq2vl_jax.config_files import with_value
from oq2vl_jax.data.text.codec import TextCodec
from oq2vl_jax.digests import digest_of_text, sample_of_file
from oq2vl_jax.errors import UserError
from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
from oq2vl_jax.paths import is_remote, read_json
from oq2vl_jax.sharding import parameter_shardings
from oq2vl_jax.trees import from_named_arrays, named_arrays
from oq2vl_jax.weights import load_weights


class Opened(NamedTuple):
    """name: folder of the checkpoint, or what was asked for; identity: changes with the weights; read: reads them,
    sharded over a mesh."""

    name: str
    identity: str
    description: CheckpointDescription
    codec: TextCodec
    read: Callable[[Mesh], OpenQwen2VL]


def open_model(path: str, weights: Weights = "model", projector: str | None = None) -> Opened:
    """Opens a checkpoint, a run directory (its newest checkpoint), RUN@STEP, an export, or a hub id, and checks it.

    weights: "ema" takes the averaged ones of a run. projector: see describe. Raises UserError.
    """
    if is_export(path):
        if weights != "model" or projector is not None:
            raise UserError(f"{path}: an export has one set of weights and a projector of ours.")
        return open_export(path)
    folder = open_checkpoint(path, weights)
    description = describe(folder, projector)
    codec = TextCodec.load(str(folder / "tokenizer"))
    model, identity = description.model, identity_of(folder)
    name = path if is_remote(path) else str(folder)
    return Opened(name, identity, description, codec, lambda mesh: load_model(folder, mesh, weights, model))


def is_export(path: str) -> bool:
    """Whether a path is a Hugging Face folder, or no path but an id of the hub such as ORG/NAME: in a folder that is
    here, a name that is not is a slip, and nobody's repository."""
    file = Path(path) / "config.json"
    if file.is_file() and not (Path(path) / "checkpoints").is_dir():
        found = read_json(str(file))
        return isinstance(found, dict) and "model_type" in found
    return not Path(path).parent.exists() and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path))


def open_export(path: str) -> Opened:
    """Opens a Hugging Face folder; its weights are read one parameter after another."""
    from_hf = bridge("from_hf")
    folder = from_hf.local_folder(path)
    importer, description, codec = from_hf.read_whole(folder, path)
    ends = [(file.name, *sample_of_file(file)) for file in sorted(folder.glob("*.safetensors"))]

    def read(mesh: Mesh) -> OpenQwen2VL:
        like = shapes_on(description.model, mesh)
        parameters, places = importer.finish(), named_arrays(like)
        arrays = {name: jax.device_put(parameters[name].make(), places[name].sharding) for name in places}
        return from_named_arrays(like, arrays)

    return Opened(path, digest_of_text(json.dumps(ends))[:16], description, codec, read)


def describe(checkpoint: Path, projector: str | None = None) -> CheckpointDescription:
    """Returns the description of a checkpoint. projector: FILE.py:NAME, the projector of the researcher's own that it
    was trained with; a checkpoint alone starts no code. Raises UserError if it is missing or another one."""
    description = load_description(checkpoint)
    recorded = description.model.projector.own
    if recorded is None and projector is None:
        return description
    if recorded is None:
        raise UserError(f"{checkpoint}: its projector is {description.model.projector.kind}; leave out --projector.")
    if projector is None:
        raise UserError(f"{checkpoint}: was trained with {recorded}; name that file with --projector FILE.py:NAME.")
    given = own_code.record(projector)
    if not own_code.same(given, recorded):
        raise UserError(f"{checkpoint}: was trained with {recorded}, and --projector is {given}.")
    own_code.load(given)  # before jax traces
    return with_value(description, "model.projector.own", given)


def load_model(
    checkpoint: Path, mesh: Mesh, weights: Weights = "model", config: ModelConfig | None = None
) -> OpenQwen2VL:
    """Loads the model of a checkpoint, with its parameters sharded over the devices. config: from `describe`; None
    takes the checkpoint's own. Raises UserError."""
    config = config or describe(checkpoint).model
    return load_weights(checkpoint, shapes_on(config, mesh), weights)


def shapes_on(config: ModelConfig, mesh: Mesh) -> OpenQwen2VL:
    """Returns a model of shapes with shardings over the devices of a mesh."""
    shapes = jax.eval_shape(lambda: OpenQwen2VL(jax.random.key(0), config))
    shardings = parameter_shardings(shapes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
