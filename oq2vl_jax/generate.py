"""python -m oq2vl_jax.generate: asks a checkpoint, one question or a file of them.

    python -m oq2vl_jax.generate --checkpoint runs/tiny --image cat.png --prompt "what is the blue shape?"
    python -m oq2vl_jax.generate --checkpoint runs/tiny --requests test.jsonl --out predictions.jsonl

A request is {"image": path or list of paths, relative to the file, "prompt": text, ...}; a prediction is the request
with "reply" added. Requests are answered in batches of similar length; the order of the file is kept.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from oq2vl_jax.config import Template
from oq2vl_jax.data.text import IMAGE
from oq2vl_jax.errors import UserError, run_command

PROMPT_BUCKET = 32
"""Prompts are padded to a multiple of this many tokens, so that few shapes are compiled."""


@dataclass(frozen=True)
class GenerateConfig:
    """Asks a checkpoint about images, by greedy decoding."""

    checkpoint: str
    """Run directory (its newest checkpoint) or one checkpoint folder."""
    image: tuple[str, ...] = ()
    """Images of the question, in order."""
    prompt: str | None = None
    """The question; the images are put before it."""
    requests: str | None = None
    """jsonl file of requests, instead of --image and --prompt."""
    out: str | None = None
    """jsonl file for the predictions of --requests."""
    template: Template | None = None
    """How the question is written; default: as the checkpoint's data was."""
    max_new_tokens: int = 64
    batch_size: int = 64


class Generator:
    """A loaded checkpoint that answers prompts."""

    def __init__(self, checkpoint: str, template: str | None = None):
        import jax

        from oq2vl_jax.config import MeshConfig
        from oq2vl_jax.data.text import TextCodec
        from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
        from oq2vl_jax.train.checkpoint import find_checkpoint, load_description, load_weights
        from oq2vl_jax.train.sharding import make_mesh, parameter_shardings

        folder = find_checkpoint(checkpoint)
        description = load_description(folder)
        self.model_config, self.template = description.model, template or description.template
        self.codec = TextCodec(str(folder / "tokenizer"))
        shapes = jax.eval_shape(lambda: OpenQwen2VL(jax.random.key(0), description.model))
        shardings = parameter_shardings(shapes, make_mesh(MeshConfig()))
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        self.model = load_weights(folder, like)

    def encode_prompt(self, prompt: str, num_images: int) -> list[int]:
        """Token ids with the images before the text. Raises UserError for a text that names images of its own."""
        if IMAGE in prompt:
            raise UserError(f"the prompt {prompt!r} contains {IMAGE}; images are put before the prompt, in order.")
        return self.codec.prompt(prompt, self.template, num_images, self.model_config.num_visual_tokens)

    def reply(self, prompts: list[list[int]], images: list[list[bytes]], max_new_tokens: int) -> list[str]:
        """Replies to tokenised prompts, whose i-th placeholder run is the i-th of the images (encoded)."""
        return [self.codec.decode(tokens).strip() for tokens in self.reply_tokens(prompts, images, max_new_tokens)]

    def reply_tokens(self, prompts: list[list[int]], images: list[list[bytes]], max_new_tokens: int) -> list[list[int]]:
        """The same as token ids, without the stop token."""
        import numpy as np

        from oq2vl_jax.data.images import decode_image
        from oq2vl_jax.eval.decoding import generate_greedy

        size, eos = self.model_config.vision.image_size, self.codec.special.eos
        lengths = np.array([len(prompt) for prompt in prompts])
        tokens = np.full((len(prompts), -(-lengths.max() // PROMPT_BUCKET) * PROMPT_BUCKET), self.codec.special.pad)
        pixels = np.zeros((len(prompts), max(map(len, images)), size, size, 3), np.uint8)
        for row, (prompt, encoded) in enumerate(zip(prompts, images, strict=True)):
            tokens[row, : len(prompt)] = prompt
            for slot, data in enumerate(encoded):
                pixels[row, slot] = decode_image(data, size)
        new_tokens = np.asarray(generate_greedy(self.model, tokens, lengths, pixels, max_new_tokens, eos))
        return [cut_at(row.tolist(), eos) for row in new_tokens]


def read_images(paths: Iterable[str]) -> list[bytes]:
    return [Path(path).read_bytes() for path in paths]


def cut_at(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop)] if stop in tokens else tokens


def answer_requests(generator: Generator, requests: list[dict], config: GenerateConfig) -> Iterator[tuple[int, dict]]:
    """(number, prediction) for every request, batched by length."""
    prompts = [generator.encode_prompt(request["prompt"], len(request["image"])) for request in requests]
    order = sorted(range(len(requests)), key=lambda i: (len(requests[i]["image"]), len(prompts[i]), i))
    for start in range(0, len(order), config.batch_size):
        chosen = order[start : start + config.batch_size]
        padded = chosen + [chosen[-1]] * (config.batch_size - len(chosen))  # one shape for the last batch as well
        replies = generator.reply(
            [prompts[i] for i in padded], [read_images(requests[i]["image"]) for i in padded], config.max_new_tokens
        )
        for i, reply in zip(chosen, replies, strict=False):
            yield i, {**requests[i], "reply": reply}


def read_requests(path: str) -> list[dict]:
    """Checks every line and every image before anything is run; reports all problems of the file together."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--requests {path}: no such file.")
    requests, problems = [], []
    for number, line in enumerate(file.read_text().rstrip("\n").split("\n"), 1):
        try:
            request = json.loads(line)
            images = [request["image"]] if isinstance(request["image"], str) else list(request["image"])
            if not isinstance(request["prompt"], str):
                raise TypeError("prompt is not a string")
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"line {number}: {type(error).__name__}: {error}")
            continue
        images = [str(file.parent / image) for image in images]
        problems += [f"line {number}: no image {image}" for image in images if not Path(image).is_file()]
        requests.append({**request, "image": images})
    if problems or not requests:
        raise UserError(
            f"--requests {path}: {'; '.join(problems[:3]) or 'the file is empty'} ({len(problems)} problems)."
        )
    return requests


def main() -> None:
    import tyro

    config = tyro.cli(GenerateConfig, prog="python -m oq2vl_jax.generate")
    if (config.requests is None) == (config.prompt is None):
        raise UserError("give either --prompt (with --image) or --requests.")
    if config.requests is not None and config.out is None:
        raise UserError("--requests needs --out, the file to write the predictions to.")
    if config.requests is not None and config.image:
        raise UserError("--image goes with --prompt; the images of --requests stand in the file.")
    if config.prompt is not None and config.out is not None:
        raise UserError("--out goes with --requests; a single reply is printed.")
    if config.out is not None and not Path(config.out).absolute().parent.is_dir():
        raise UserError(f"--out {config.out}: its folder does not exist.")
    if config.max_new_tokens < 1 or config.batch_size < 1:
        raise UserError("--max-new-tokens and --batch-size must be at least 1.")
    missing = [image for image in config.image if not Path(image).is_file()]
    if missing:
        raise UserError(f"--image {missing[0]}: no such file.")
    from oq2vl_jax.data.images import ImageError

    requests = read_requests(config.requests) if config.requests else None
    generator = Generator(config.checkpoint, config.template)
    try:
        if requests is None:
            prompt = generator.encode_prompt(config.prompt or "", len(config.image))
            print(generator.reply([prompt], [read_images(config.image)], config.max_new_tokens)[0])
        else:
            write_predictions(generator, requests, config)
    except ImageError as problem:
        raise UserError(f"an image cannot be used: {problem}.") from problem


def write_predictions(generator: Generator, requests: list[dict], config: GenerateConfig) -> None:
    from rich.console import Console
    from rich.progress import track

    predictions = answer_requests(generator, requests, config)
    if sys.stderr.isatty():
        predictions = track(predictions, "answering", total=len(requests), console=Console(stderr=True))
    answered = dict(predictions)
    partial = f"{config.out}.partial"
    Path(partial).write_text("".join(json.dumps(answered[i]) + "\n" for i in range(len(requests))))
    os.replace(partial, str(config.out))
    print(f"{len(requests)} replies written to {config.out}")


if __name__ == "__main__":
    run_command(main)
