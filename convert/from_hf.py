"""python -m convert.from_hf: converts Hugging Face weights to an Orbax checkpoint that oq2vl_jax.train starts from.

    python -m convert.from_hf --vision siglip-so400m-patch14-384 --decoder Qwen2.5-1.5B-Instruct --out siglip_qwen
    python -m convert.from_hf --model exported_model --out checkpoints/back

The first command puts a freshly initialised projector between the two. The second reads a complete model: an export of
convert.to_hf, or any Llava checkpoint of SigLIP + linear/gelu/linear + Qwen2.
"""

import dataclasses
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from oq2vl_jax.bounds import Length, Seed, parse
from oq2vl_jax.config import Template
from oq2vl_jax.errors import UserError, run_command

if TYPE_CHECKING:
    from oq2vl_jax.config import CheckpointDescription
    from oq2vl_jax.data.text.codec import TextCodec

    from .import_weights import Import

VISUAL_TOKENS = 144
"""Of the published pre-training."""


@dataclass(frozen=True)
class FromHFConfig:
    """Converts Hugging Face weights (local folders, or hub ids if there is a network) to an Orbax checkpoint."""

    out: str
    """Folder to write. It appears only when the checkpoint is complete."""
    vision: str | None = None
    """SigLIP: the vision model alone or both towers."""
    decoder: str | None = None
    """Qwen2.5, with its tokenizer."""
    model: str | None = None
    """Llava-style model, instead of --vision and --decoder."""
    visual_tokens: Length | None = None
    """Visual tokens per image; with --vision and --decoder alone. Default: 144."""
    template: Template | None = None
    """Template of prompts to this model. Default: the one that an export names; else plain with --vision and --decoder,
    chatml with --model."""
    activation: Literal["gelu", "gelu_tanh"] | None = None
    """Activation of the encoder; with --vision and --decoder alone. Default: as in its config.json (the hub's SigLIP:
    gelu_tanh). The published model was trained with the exact gelu on the same weights."""
    seed: Seed | None = None
    """Seed of the fresh projector; with --vision and --decoder alone. Default: 0."""


def convert(config: FromHFConfig) -> str:
    """Writes the checkpoint and returns a line about it. Raises UserError before anything is written."""
    from .checkpoint_stream import check_is_free

    check_is_free(Path(config.out))
    if config.model is not None:
        return convert_whole(config, local_folder(config.model))
    assert config.vision is not None
    assert config.decoder is not None
    return convert_parts(config, local_folder(config.vision), local_folder(config.decoder))


def convert_parts(config: FromHFConfig, vision: Path, decoder: Path) -> str:
    from oq2vl_jax.config import CheckpointDescription, ModelConfig
    from oq2vl_jax.data.text.codec import TextCodec

    from .hf_config import read_decoder_config, read_vision_config
    from .import_weights import Import, parameter_shapes
    from .tensor_files import Renamed, SafetensorsSource

    encoder, sizes = read_vision_config(vision), read_decoder_config(decoder)
    if config.activation:
        encoder = dataclasses.replace(encoder, activation=config.activation)
    codec = TextCodec.from_transformers(str(decoder))  # after the configuration is checked: it fails on a bad one
    model = ModelConfig(encoder, sizes, config.visual_tokens or VISUAL_TOKENS, codec.special.image)
    importer = Import(parameter_shapes(model))
    importer.add("siglip", Renamed(SafetensorsSource(vision), siglip_name), ("vision",), model.vision.num_layers)
    importer.add("qwen2", SafetensorsSource(decoder), ("decoder",))
    importer.add_arrays(fresh_projector(model, config.seed or 0))
    origin = f"{name_of(config.vision)} + {name_of(config.decoder)}, fresh projector (seed {config.seed or 0})"
    return write(config.out, importer, CheckpointDescription(model, config.template or "plain", origin), codec)


def convert_whole(config: FromHFConfig, folder: Path) -> str:
    importer, description, codec = read_whole(folder, str(config.model))
    description = dataclasses.replace(description, template=config.template or description.template)
    return write(config.out, importer, description, codec)


def read_whole(folder: Path, path_or_id: str) -> tuple["Import", "CheckpointDescription", "TextCodec"]:
    """Returns (import, description, tokenizer) of a Llava-style folder; no weight is read before Import.finish."""
    from oq2vl_jax.config import CheckpointDescription
    from oq2vl_jax.data.text.codec import TextCodec

    from .hf_config import read_llava_config
    from .import_weights import Import, parameter_shapes
    from .tensor_files import Renamed, SafetensorsSource

    model, template, num_vision_blocks = read_llava_config(folder)
    codec = TextCodec.from_transformers(str(folder))
    # Any id may mark an image, because its embedding is never used. The tokenizer decides.
    model = dataclasses.replace(model, image_token_id=codec.special.image)
    check_tokenizer(codec, model)
    importer = Import(parameter_shapes(model))
    importer.add("llava", Renamed(SafetensorsSource(folder), llava_name), num_vision_blocks=num_vision_blocks)
    return importer, CheckpointDescription(model, template or "chatml", name_of(path_or_id)), codec


def write(out: str, importer, description, codec) -> str:
    """Checks the import and writes the checkpoint: the last step of from_hf and from_prismatic."""
    from .checkpoint_stream import save_checkpoint
    from .import_weights import summarize_left_out

    check_tokenizer(codec, description.model)
    parameters = importer.finish()
    print(summarize_left_out(importer.left_out) or "every tensor is used", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        codec.save(Path(folder))
        save_checkpoint(Path(out), parameters, description, Path(folder))
    count = sum(parameter.size for parameter in parameters.values())
    return (
        f"{out}: {count:,} parameters, {description.model.num_visual_tokens} visual tokens an image, "
        f"template {description.template}; from {description.origin}"
    )


def check_tokenizer(codec, model) -> None:
    if codec.vocab_size > model.decoder.vocab_size:
        raise UserError(
            f"the tokenizer has {codec.vocab_size} entries with its added tokens, the decoder's embedding "
            f"{model.decoder.vocab_size}."
        )


def fresh_projector(model, seed: int) -> dict:
    """Returns the parameters of a new projector, initialised as in training."""
    import jax
    import numpy as np

    from oq2vl_jax.model.projector import make_projector
    from oq2vl_jax.trees import named_arrays

    arrays = named_arrays(make_projector(jax.random.key(seed), model))
    return {f"projector.{name}": np.asarray(array) for name, array in arrays.items()}


def siglip_name(name: str) -> str:
    """Adds the prefix vision_model., which files of the vision model alone may omit."""
    if name.startswith(("embeddings.", "encoder.", "post_layernorm.", "head.")):
        return f"vision_model.{name}"
    return name


def llava_name(name: str) -> str:
    """Renames a weight as in the files on the hub, which transformers reads and other software expects.

    The other names are internal to transformers since 4.52; version 5 writes them for a new model."""
    name = re.sub(r"^model\.(vision_tower|multi_modal_projector)\.", r"\1.", name)
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def name_of(path_or_id: str | None) -> str:
    """Returns the name for a model card: a hub id unchanged, a folder's own name without its path."""
    path = Path(str(path_or_id))
    return path.resolve().name if path.exists() else str(path_or_id)


CONFIG_FILES = ("*.json", "*.txt", "*.jinja")


def local_folder(path_or_id: str, patterns: tuple[str, ...] = (*CONFIG_FILES, "*.safetensors")) -> Path:
    """Returns a local folder as it is, or downloads the matching files of an id such as Qwen/Qwen2.5-1.5B-Instruct."""
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path_or_id):
        raise UserError(f"{path_or_id}: no such folder.")
    from huggingface_hub import snapshot_download

    from .hub import hub_errors

    with hub_errors(f"{path_or_id}: no such folder, and it could not be fetched from the hub"):
        return Path(snapshot_download(path_or_id, allow_patterns=list(patterns)))


def main() -> None:

    config = parse(FromHFConfig, prog="python -m convert.from_hf")
    parts = [config.vision, config.decoder]
    if not ((config.model is None and None not in parts) or (config.model is not None and parts == [None, None])):
        raise UserError("give either --vision and --decoder, or --model.")
    of_parts = ("visual_tokens", "activation", "seed")
    flags = [f"--{name.replace('_', '-')}" for name in of_parts if getattr(config, name) is not None]
    if config.model is not None and flags:
        raise UserError(f"{', '.join(flags)} with --model: its own configuration and projector decide; leave it out.")
    print(convert(config))


if __name__ == "__main__":
    run_command(main)
