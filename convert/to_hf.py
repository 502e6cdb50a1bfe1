"""python -m convert.to_hf: converts a checkpoint to a Hugging Face folder.

    python -m convert.to_hf runs/sft_llava --out exported            # 729 tokens: transformers' own Llava classes
    python -m convert.to_hf runs/pretrain --out exported             # pooled: the same files and one small module
    python -m convert.to_hf runs/lora --out adapter --adapter-only   # for PEFT, on the export of the run's base

If there are as many visual tokens as patches (pooling is the identity) and the rotary inverse frequencies are float32,
the model is exactly transformers' LlavaForConditionalGeneration: it needs no remote code and loads in any software that
reads Llava.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from oq2vl_jax.bounds import parse
from oq2vl_jax.config import Weights
from oq2vl_jax.errors import UserError, run_command

MAX_SHARD_BYTES = 5 * 10**8
"""A shard is in memory twice while it is written. Peak memory of a 2B export was 1.64 times the size of its files with
shards of 2 GB, and 1.49 times with 1 GB."""


@dataclass(frozen=True)
class ToHFConfig:
    """Converts a checkpoint to a Hugging Face folder: safetensors, configuration, tokenizer, processor, model card."""

    checkpoint: tyro.conf.Positional[str]
    """Run directory (its newest checkpoint) or one checkpoint folder."""
    out: str
    """Folder to write. It appears only when it is complete."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    weights: Weights = "model"
    """ema: the averaged weights of a run with --ema.decay."""
    native: bool = False
    """Require transformers' own classes. Fails with the reason if they cannot express this model."""
    adapter_only: bool = False
    """Write the adapters of a run with --lora.rank for PEFT, on top of the export of what the run started from. Without
    it they are merged."""
    push_to_hub: str | None = None
    """ORG/NAME on the Hugging Face hub, to which the folder is uploaded when it is complete. The token is that of
    HF_TOKEN or of `hf auth login`."""
    private: bool = False
    """Make the repository private, if --push-to-hub makes it."""
    results: str | None = None
    """Folder of an evaluation of this checkpoint (--out of oq2vl_jax.eval), for the table of the model card."""


def export(config: ToHFConfig) -> str:
    """Writes the folder, pushes it if asked, and returns a line about it. Raises UserError."""
    from .hub import check_can_push, push

    if config.private and config.push_to_hub is None:
        raise UserError("--private: makes a repository of --push-to-hub private; give both.")
    if config.adapter_only and (config.native or config.results):
        raise UserError("--adapter-only writes neither a whole model nor a card; leave out --native and --results.")
    if config.push_to_hub is not None:
        check_can_push(config.push_to_hub)
    line = write_folder(config)
    if config.push_to_hub is not None:
        line += f"; pushed to {push(Path(config.out), config.push_to_hub, config.private)}"
    return line


def write_folder(config: ToHFConfig) -> str:
    from oq2vl_jax.checkpoint import load_description, open_checkpoint

    from .checkpoint_stream import CheckpointReader, check_is_free, new_folder
    from .export_config import check_has_export, why_not_native

    check_is_free(Path(config.out))
    checkpoint = open_checkpoint(config.checkpoint, config.weights)
    description = load_description(checkpoint)
    check_has_export(description.model)
    if config.adapter_only:
        from .export_adapter import write_adapter

        with new_folder(Path(config.out)) as folder:
            return f"{config.out}: {write_adapter(folder, checkpoint, config.weights)}"
    reason = why_not_native(description.model)
    if config.native and reason:
        raise UserError(f"--native: this model is not transformers' LlavaForConditionalGeneration: {reason}.")
    layout = "open_qwen2vl" if reason else "llava"
    with new_folder(Path(config.out)) as folder:
        write_text_side(folder, checkpoint, description, config)
        if reason:
            from .export_files import modeling_open_qwen2vl

            shutil.copyfile(modeling_open_qwen2vl.__file__, folder / "modeling_open_qwen2vl.py")
        write_weights(folder, layout, CheckpointReader(checkpoint, config.weights), config.dtype)
    kind = f"with modeling_open_qwen2vl.py, as {reason}" if reason else "LlavaForConditionalGeneration, no remote code"
    return f"{config.out}: {config.dtype}, {kind}"


def check_imports() -> None:
    """Raises ImportError if a package that an export needs is missing."""
    import safetensors  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401


def write_weights(folder: Path, layout: str, reader, dtype: str) -> None:
    import ml_dtypes
    import numpy as np

    from .export_weights import exported_shapes, exported_tensors, vision_filler
    from .tensor_files import SafetensorsWriter

    numpy_dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(np.float32)
    filler = vision_filler(layout, reader.shapes, has_pooling_head=False)
    shapes = exported_shapes(layout, reader.shapes, filler)
    sizes = {name: int(np.prod(shape)) * numpy_dtype.itemsize for name, shape in shapes.items()}
    writer = SafetensorsWriter(folder, sizes, MAX_SHARD_BYTES)
    for name, tensor in exported_tensors(layout, reader, numpy_dtype, filler):
        writer.add(name, tensor)
    writer.close()


def write_text_side(folder: Path, checkpoint: Path, description, config: ToHFConfig) -> None:
    """Writes all but the weights and the module: configuration, tokenizer, processor, generation config, model card."""
    from transformers import AutoTokenizer, GenerationConfig, LlavaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    from oq2vl_jax.checkpoint import load_train_config
    from oq2vl_jax.data.text.codec import TextCodec
    from oq2vl_jax.data.text.tokenizer import IMAGE_PAD

    from .export_config import to_llava_config, why_not_native
    from .export_files.chat_templates import chat_template
    from .export_files.model_card import model_card, read_facts
    from .export_tokenizer import complete_tokenizer
    from .hf_config import MEAN, STD

    model, codec = description.model, TextCodec.load(str(checkpoint / "tokenizer"))
    special = codec.special
    size = {"height": model.vision.image_size, "width": model.vision.image_size}
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3),
        tokenizer=AutoTokenizer.from_pretrained(checkpoint / "tokenizer"),
        patch_size=model.vision.patch_size,
        vision_feature_select_strategy="full",
        image_token=IMAGE_PAD,
        num_additional_image_tokens=model.num_visual_tokens - model.vision.num_patches,
        chat_template=chat_template(description.template, codec),
    )
    processor.save_pretrained(folder)
    complete_tokenizer(folder)
    write_preprocessor_configs(folder, processor.image_processor)
    values = to_llava_config(model, description.template, config.dtype, special)
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    GenerationConfig(
        bos_token_id=special.bos, eos_token_id=[special.eos, special.pad], pad_token_id=special.pad, do_sample=False
    ).save_pretrained(folder)
    is_native = why_not_native(model) is None
    facts = read_facts(checkpoint, config.results, config.push_to_hub)
    (folder / "README.md").write_text(model_card(description, load_train_config(checkpoint), is_native, facts))


def write_preprocessor_configs(folder: Path, image_processor) -> None:
    """Writes preprocessor_config.json for transformers 4, with the class name that it knows.

    Adds crop_size to both files: vLLM's Llava takes the image size from it, and nothing else reads it here."""
    from .export_tokenizer import write_json

    values = image_processor.to_dict() | {"image_processor_type": "SiglipImageProcessor"}
    values["crop_size"] = {name: values["size"][name] for name in ("height", "width")}
    write_json(folder / "preprocessor_config.json", values)
    file = folder / "processor_config.json"
    both = json.loads(file.read_text())
    both["image_processor"]["crop_size"] = values["crop_size"]
    write_json(file, both)


def main() -> None:
    config = parse(ToHFConfig, prog="python -m convert.to_hf")
    print(export(config))


if __name__ == "__main__":
    run_command(main)
