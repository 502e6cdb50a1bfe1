"""python -m convert.from_prismatic: a checkpoint of the published PyTorch code to an Orbax checkpoint.

    python -m convert.from_prismatic Open-Qwen2VL --decoder Qwen2.5-1.5B-Instruct --vision siglip-so400m-patch14-384 \\
        --out checkpoints/open_qwen2vl

The file holds projector and decoder, and the vision encoder where that was trained; where it was not, --vision says
which one it was. Exact GELU and bf16-rounded rotary inverse frequencies, which that code has, become part of the
configuration.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from oq2vl_jax.bounds import parse
from oq2vl_jax.config import Template
from oq2vl_jax.errors import UserError, run_command


@dataclass(frozen=True)
class FromPrismaticConfig:
    """A run directory of the published code to an Orbax checkpoint."""

    run_dir: tyro.conf.Positional[str]
    """Folder with config.json and checkpoints/latest-checkpoint.pt."""
    out: str
    """Folder to write; it appears when the checkpoint is whole."""
    vision: str | None = None
    """SigLIP where the run did not train it: a Hugging Face folder, or a file with timm's names."""
    decoder: str | None = None
    """Qwen2.5 folder or hub id, for tokenizer and sizes; its weights are not read. Default: the hub's, by the run's
    llm_backbone_id."""
    file: str = "checkpoints/latest-checkpoint.pt"
    """Which checkpoint of the run, relative to its folder."""
    template: Template | None = None
    """How prompts are written to this model. Default: plain for a pretrain stage, else open_qwen2vl."""


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
    codec = TextCodec(str(decoder))
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
    """A Hugging Face SigLIP folder, or a state dict with timm's names."""
    from .from_hf import siglip_name
    from .hf_config import read_vision_config
    from .tensor_files import Renamed, SafetensorsSource, open_source

    if vision.is_dir():
        num_blocks = read_vision_config(vision).num_layers
        importer.add("siglip", Renamed(SafetensorsSource(vision), siglip_name), ("vision",), num_blocks)
    else:
        importer.add("timm", Renamed(open_source(vision), timm_name), ("vision",))


def timm_name(name: str) -> str:
    """timm's own name of a weight: the prefixes of Prismatic and open_clip files go."""
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
