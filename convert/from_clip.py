"""python -m convert.from_clip: converts a Hugging Face CLIP to a checkpoint for oq2vl_jax.curate.score.

python -m convert.from_clip openai/clip-vit-large-patch14 --out checkpoints/clip_l14
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from oq2vl_jax.bounds import parse
from oq2vl_jax.errors import UserError, run_command
from oq2vl_jax.model.clip_config import ClipConfig, ClipTowerConfig

ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh", "quick_gelu"]] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""hidden_act of transformers -> our activation."""


@dataclass(frozen=True)
class FromClipConfig:
    """Converts both towers of a Hugging Face CLIP to an Orbax checkpoint."""

    model: tyro.conf.Positional[str]
    """Local folder, or a hub id if there is a network: config.json, weights as safetensors, tokenizer."""
    out: str
    """Folder to write. It appears only when the checkpoint is complete."""


def convert(config: FromClipConfig) -> str:
    """Writes the checkpoint and returns a line about it. Raises UserError before anything is written."""
    import jax

    from oq2vl_jax.model.clip import Clip
    from oq2vl_jax.model.clip_config import ClipDescription
    from oq2vl_jax.trees import named_arrays

    from .checkpoint_stream import check_is_free, save_checkpoint
    from .from_hf import local_folder, name_of
    from .import_weights import Import, summarize_left_out
    from .tensor_files import SafetensorsSource

    check_is_free(Path(config.out))
    folder = local_folder(config.model)
    tokenizer = load_tokenizer(folder)
    model = read_clip_config(folder, tokenizer.eos_token_id)
    if len(tokenizer) > model.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {len(tokenizer)} entries, the text tower {model.vocab_size}.")
    shapes = jax.eval_shape(lambda: Clip(jax.random.key(0), model))
    importer = Import({name: tuple(array.shape) for name, array in named_arrays(shapes).items()})
    importer.add("clip", SafetensorsSource(folder))
    parameters = importer.finish()
    print(summarize_left_out(importer.left_out) or "every tensor is used", file=sys.stderr)
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        save_checkpoint(Path(config.out), parameters, ClipDescription(model, name_of(config.model)), Path(saved))
    return f"{config.out}: {sum(parameter.size for parameter in parameters.values()):,} parameters"


def read_clip_config(folder: Path, eos_id: int) -> ClipConfig:
    """Reads the config.json of a CLIPModel. Raises UserError for any other file."""
    from transformers import CLIPConfig

    from .hf_config import check_model_type, malformed_is_an_error, parse, read_json

    file = folder / "config.json"
    with malformed_is_an_error(file):
        values = read_json(file)
        check_model_type(values, ("clip",), str(file))
        theirs = parse(CLIPConfig, values, str(file))
        towers = {}
        for name, tower in (("image_tower", theirs.vision_config), ("text_tower", theirs.text_config)):
            if tower.hidden_act not in ACTIVATIONS:
                raise UserError(
                    f"{file}: hidden_act is {tower.hidden_act!r}, expected one of {', '.join(ACTIVATIONS)}."
                )
            towers[name] = ClipTowerConfig(
                hidden_size=tower.hidden_size,
                intermediate_size=tower.intermediate_size,
                num_layers=tower.num_hidden_layers,
                num_heads=tower.num_attention_heads,
                activation=ACTIVATIONS[tower.hidden_act],
                layer_norm_eps=tower.layer_norm_eps,
            )
        return ClipConfig(
            **towers,
            image_size=theirs.vision_config.image_size,
            patch_size=theirs.vision_config.patch_size,
            vocab_size=theirs.text_config.vocab_size,
            max_text_tokens=theirs.text_config.max_position_embeddings,
            projection_dim=theirs.projection_dim,
            eos_id=eos_id,
        )


def load_tokenizer(folder: Path):
    import transformers

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(
            f"{folder}: no tokenizer there (tokenizer.json or vocab.json)."
        )  # transformers would make an empty tokenizer
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust library raises a plain Exception for a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: no tokenizer could be loaded: {reason}") from error


def main() -> None:
    config = parse(FromClipConfig, prog="python -m convert.from_clip")
    print(convert(config))


if __name__ == "__main__":
    run_command(main)
