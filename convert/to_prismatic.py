"""python -m convert.to_prismatic: converts a checkpoint to a run directory that the published PyTorch code loads.

    python -m convert.to_prismatic runs/sft_llava --out prismatic/oq2vl-jax

Prints what that code computes differently from this model: it has only exact GELU and bf16-rounded rotary inverse
frequencies.
"""

import errno
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from oq2vl_jax.bounds import parse
from oq2vl_jax.config import ProjectorConfig
from oq2vl_jax.errors import UserError, run_command


@dataclass(frozen=True)
class ToPrismaticConfig:
    """Converts a checkpoint to the layout of the published code, in float32 like the published files."""

    checkpoint: tyro.conf.Positional[str]
    """Run directory (its newest checkpoint) or one checkpoint folder."""
    out: str
    """Run directory to write. It appears only when it is complete."""
    without_vision: bool = False
    """Leave out the vision encoder, as the published files do if it was frozen; that code then downloads timm's."""


def export(config: ToPrismaticConfig) -> str:
    """Writes the run directory and returns a line about it. Holds the model once, in float32."""
    import numpy as np
    import torch

    from oq2vl_jax.checkpoint import load_description, open_checkpoint

    from .checkpoint_stream import CheckpointReader, check_is_free, new_folder
    from .export_weights import exported_tensors, vision_filler
    from .prismatic import LATEST, differences_from_published, run_config

    check_is_free(Path(config.out))
    checkpoint = open_checkpoint(config.checkpoint)
    description = load_description(checkpoint)
    if description.model.projector != ProjectorConfig():
        raise UserError("the published code has no projector but avg_pool_mlp.")
    if not (description.model.decoder.is_published_kind and description.model.decoder.kind == "qwen2"):
        raise UserError("the published code has no decoder but Qwen2.5; convert.to_hf exports this one.")
    for difference in differences_from_published(description.model):
        print(f"note: the published code will differ from this model: {difference}", file=sys.stderr)
    reader = CheckpointReader(checkpoint)
    filler = {} if config.without_vision else vision_filler("prismatic", reader.shapes, has_pooling_head=True)
    if config.without_vision:
        reader.shapes = {name: shape for name, shape in reader.shapes.items() if not name.startswith("vision.")}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in exported_tensors("prismatic", reader, np.dtype(np.float32), filler):
        part, tensor_name = name.split(".", 1)
        parts.setdefault(part, {})[tensor_name] = torch.from_numpy(tensor)
    decoder = parts["llm_backbone"]
    decoder.setdefault("llm.lm_head.weight", decoder["llm.model.embed_tokens.weight"])  # tied: one storage, two names
    with new_folder(Path(config.out)) as folder:
        (folder / LATEST).parent.mkdir()
        save(parts, folder / LATEST, config.out)
        values = run_config(description.model, description.template)
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    count = sum(tensor.numel() for part in parts.values() for tensor in part.values())
    return f"{config.out}: {count:,} numbers in {', '.join(sorted(parts))}"


def save(parts: dict, file: Path, out: str) -> None:
    """Writes the parts. Raises OSError for a full disk, which torch's error does not name, else UserError."""
    import torch

    try:
        torch.save({"model": parts}, file)
    except RuntimeError as error:
        if shutil.disk_usage(file.parent).free < sum(x.nbytes for part in parts.values() for x in part.values()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), out) from error
        raise UserError(f"{out}: could not be written ({str(error).splitlines()[0]}).") from error


def main() -> None:
    print(export(parse(ToPrismaticConfig, prog="python -m convert.to_prismatic")))


if __name__ == "__main__":
    run_command(main)
