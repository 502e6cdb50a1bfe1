"""python -m convert.from_prismatic: converts a checkpoint of the published PyTorch code to an Orbax checkpoint.

    python -m convert.from_prismatic Open-Qwen2VL --decoder Qwen2.5-1.5B-Instruct --vision siglip-so400m-patch14-384 \\
        --out checkpoints/open_qwen2vl

The file holds projector and decoder. It holds the vision encoder only if the run trained it; otherwise --vision names
the encoder that the run used. The configuration gets exact GELU and bf16-rounded rotary inverse frequencies, as in that
code.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from oq2vl_jax.bounds import parse
from oq2vl_jax.config import Template
from oq2vl_jax.errors import UserError, run_command


@dataclass(frozen=True)
class FromPrismaticConfig:
    """Converts a run directory of the published code to an Orbax checkpoint."""

    run_dir: tyro.conf.Positional[str]
    """Folder with config.json and checkpoints/latest-checkpoint.pt."""
    out: str
    """Folder to write. It appears only when the checkpoint is complete."""
    vision: str | None = None
    """SigLIP, if the run did not train it: a Hugging Face folder or hub id, or a file with timm's names."""
    decoder: str | None = None
    """Qwen2.5 folder or hub id, for tokenizer and sizes; its weights are not read. Default: the hub's model that the
    run's llm_backbone_id names."""
    file: str = "checkpoints/latest-checkpoint.pt"
    """Checkpoint of the run, relative to its folder."""
    template: Template | None = None
    """Template of prompts to this model. Default: the one that config.json names if this project wrote it, else plain
    for a pretrain stage and open_qwen2vl for others."""


def convert(config: FromPrismaticConfig) -> str:
    """Writes the checkpoint and returns a line about it. Raises UserError before anything is written."""
    from oq2vl_jax.config import CheckpointDescription
    from oq2vl_jax.data.text.codec import TextCodec

    from .checkpoint_stream import check_is_free
    from .from_hf import CONFIG_FILES, local_folder, name_of, write
    from .import_weights import Import, parameter_shapes
    from .prismatic import decoder_on_the_hub, read_run
    from .tensor_files import TorchSource

    check_is_free(Path(config.out))
    run_dir = Path(config.run_dir)
    file = run_dir / config.file
    if not file.is_file():
        present = sorted(str(path.relative_to(run_dir)) for path in run_dir.glob("checkpoints/*.pt"))
        raise UserError(f"{file}: no such file; there: {', '.join(present) or 'no checkpoints/*.pt'}.")
    decoder = local_folder(config.decoder or decoder_on_the_hub(run_dir), CONFIG_FILES)
    vision = local_vision(config.vision)
    codec = TextCodec.from_transformers(str(decoder))
    vision_folder = vision if vision and vision.is_dir() else None
    model, template = read_run(run_dir, vision_folder, decoder, codec.special.image)
    source = TorchSource(file, root="model")
    importer = Import(parameter_shapes(model))
    has_vision = any(name.startswith("vision_backbone.") for name in source.shapes)
    if has_vision and vision:
        raise UserError(f"{file} holds the vision encoder it was trained with; leave --vision out.")
    if not has_vision and not vision:
        raise UserError(f"{file} holds no vision encoder (it was not trained); say which it was with --vision.")
    parts = ("vision", "projector", "decoder") if has_vision else ("projector", "decoder")
    importer.add("prismatic", source, parts)
    if vision:
        add_vision(importer, vision)
    description = CheckpointDescription(model, config.template or template, f"{name_of(config.run_dir)}/{config.file}")
    return write(config.out, importer, description, codec)


def add_vision(importer, vision: Path) -> None:
    """Adds the encoder from a Hugging Face SigLIP folder or from a state dict with timm's names."""
    from .from_hf import siglip_name
    from .hf_config import read_vision_config
    from .tensor_files import Renamed, SafetensorsSource, open_source

    if vision.is_dir():
        num_blocks = read_vision_config(vision).num_layers
        importer.add("siglip", Renamed(SafetensorsSource(vision), siglip_name), ("vision",), num_blocks)
    else:
        importer.add("timm", Renamed(open_source(vision), timm_name), ("vision",))


def timm_name(name: str) -> str:
    """Removes the prefixes of Prismatic and open_clip files, which leaves timm's name of a weight."""
    for prefix in ("model.vision_backbone.featurizer.", "vision_backbone.featurizer.", "featurizer.", "visual.trunk."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def local_vision(path_or_id: str | None) -> Path | None:
    from .from_hf import local_folder

    if path_or_id is None or Path(path_or_id).is_file():
        return Path(path_or_id) if path_or_id else None
    return local_folder(path_or_id)


def main() -> None:
    print(convert(parse(FromPrismaticConfig, prog="python -m convert.from_prismatic")))


if __name__ == "__main__":
    run_command(main)
