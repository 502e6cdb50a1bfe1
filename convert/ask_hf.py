"""python -m convert.ask_hf: asks an exported model with plain transformers; compares its reply with the checkpoint's.

    python -m convert.ask_hf exported --image cat.png --prompt "what is the blue shape?" --same-as runs/sft_llava

AutoProcessor, AutoModelForImageTextToText and generate run the exported model, in float32. The only code of ours that
runs is modeling_open_qwen2vl.py, if the folder has it.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from oq2vl_jax.bounds import Length, parse
from oq2vl_jax.config import Weights
from oq2vl_jax.errors import UserError, run_command


@dataclass(frozen=True)
class AskHFConfig:
    """Asks an exported model one question with plain transformers, by greedy decoding."""

    model: tyro.conf.Positional[str]
    """Folder that convert.to_hf wrote."""
    prompt: str
    """The question; the images are put before it."""
    image: tuple[str, ...] = ()
    """Images of the question, in order."""
    same_as: str | None = None
    """Checkpoint of this project to ask as well. The command fails if the two replies differ."""
    weights: Weights = "model"
    """Weights of --same-as: ema for an export of the averaged ones."""
    trust_remote_code: bool = False
    """Needed for models with modeling_open_qwen2vl.py; it runs the code in the folder."""
    max_new_tokens: Length = 64


def ask(config: AskHFConfig) -> str:
    """Returns the reply of the exported model. Raises UserError if the folder cannot be loaded."""
    import torch
    from PIL import Image
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if not (Path(config.model) / "config.json").is_file():
        raise UserError(f"{config.model}: no config.json there; convert.to_hf writes such a folder.")
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            config.model, dtype=torch.float32, trust_remote_code=config.trust_remote_code
        )
        processor = AutoProcessor.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    except (ValueError, OSError, SafetensorError) as error:
        raise UserError(f"{config.model}: {str(error).strip().splitlines()[0]}") from error
    content = [{"type": "image"}] * len(config.image) + [{"type": "text", "text": config.prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [Image.open(path) for path in config.image] or None
    inputs = processor(images=images, text=text, return_tensors="pt")
    with torch.no_grad():
        tokens = model.eval().generate(**inputs, max_new_tokens=config.max_new_tokens)  # pyright: ignore[reportAttributeAccessIssue]
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def ask_checkpoint(config: AskHFConfig) -> str:
    from oq2vl_jax.generate.generator import Generator
    from oq2vl_jax.generate.reply import SamplingOptions
    from oq2vl_jax.generate.requests import read_images

    generator = Generator(str(config.same_as), weights=config.weights)
    return generator.ask(config.prompt, read_images(config.image), SamplingOptions(config.max_new_tokens))


def check_images(paths: tuple[str, ...]) -> None:
    from oq2vl_jax.data.samples.images import ImageError, check_image

    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"--image {path}: no such file.")
        try:
            check_image(Path(path).read_bytes())
        except ImageError as problem:
            raise UserError(f"--image {path}: {problem}.") from problem


def main() -> int:
    config = parse(AskHFConfig, prog="python -m convert.ask_hf")
    check_images(config.image)
    reply = ask(config)
    print(f"transformers: {reply}")
    if config.same_as is None:
        return 0
    ours = ask_checkpoint(config)
    print(f"oq2vl_jax:    {ours}")
    print("the same reply" if ours == reply else "NOT the same reply")
    return 0 if ours == reply else 1


if __name__ == "__main__":
    run_command(main)
