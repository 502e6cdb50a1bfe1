"""python -m oq2vl_jax.generate: asks a checkpoint, one question or a file of them.

    python -m oq2vl_jax.generate --checkpoint runs/tiny --image cat.png --prompt "what is the blue shape?"
    python -m oq2vl_jax.generate --checkpoint runs/tiny --requests test.jsonl --out predictions.jsonl

A request is {"prompt": text, "image": path or list of paths, relative to the file, ...}; a prediction is the request
with "reply" and "finish_reason" added. Requests are answered in batches of similar length; the order of the file is
kept. Predictions are written as they come, and the same command goes on where it was ended. The reply to a single
prompt is printed as it is written.
"""

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oq2vl_jax.bounds import CountOrZero, Length, Seed, SmallCount, Temperature, TopP, check_bounds, parse
from oq2vl_jax.config import PromptForm, Template
from oq2vl_jax.errors import UserError, run_command
from oq2vl_jax.paths import check_local, file_version, whole_output

if TYPE_CHECKING:
    from oq2vl_jax.eval.generator import Generator
    from oq2vl_jax.eval.reply import SamplingOptions

REQUESTS_AT_ONCE = 2048
"""Sorted by length together, their pictures in memory."""


@dataclass(frozen=True)
class GenerateConfig:
    """Asks a checkpoint about images. Greedy by default: the most likely token each time."""

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
    prompt_form: PromptForm = "training"
    """published: as the code of the paper asks its released weights (template open_qwen2vl alone)."""
    max_new_tokens: Length = 64
    temperature: Temperature = 0.0
    """Above 0: draw each token, from flatter probabilities the higher it is."""
    top_p: TopP = 1.0
    """Draw from the most likely tokens that together have this probability."""
    top_k: CountOrZero = 0
    """Draw from this many most likely tokens; 0: from all."""
    seed: Seed = 0
    """The same request with the same seed gets the same reply."""
    stop: tuple[str, ...] = ()
    """Texts that end a reply, and are cut off."""
    batch_size: SmallCount = 64


def read_images(paths: Iterable[str]) -> list[bytes]:
    return [Path(path).read_bytes() for path in paths]


def answer_requests(
    generator: "Generator", requests: list[dict], options: "SamplingOptions", batch_size: int
) -> Iterator[tuple[int, dict]]:
    """(number, prediction) for every request. Pictures are read some thousand requests at a time."""
    from oq2vl_jax.eval.generator import Request

    for first in range(0, len(requests), REQUESTS_AT_ONCE):
        some = requests[first : first + REQUESTS_AT_ONCE]
        contents = {path: Path(path).read_bytes() for request in some for path in request["image"]}
        encoded = [
            Request(generator.encode_prompt(r["prompt"], len(r["image"])), [contents[path] for path in r["image"]])
            for r in some
        ]
        for i, reply in generator.generate_all(encoded, options, batch_size):
            yield first + i, {**some[i], "reply": reply.text.strip(), "finish_reason": reply.finish_reason}


def read_requests(path: str) -> list[dict]:
    """Checks every line and every image before anything is run; reports all problems of the file together."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--requests {path}: no such file.")
    requests, problems = [], []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--requests {path}: not UTF-8: {error}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
            images = request.get("image") or []
            images = [images] if isinstance(images, str) else list(images)
            if not isinstance(request["prompt"], str) or not all(isinstance(image, str) for image in images):
                raise TypeError("prompt or image is not a string")
            request["prompt"].encode("utf-8")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            problems.append(
                f"line {number} is no JSON object with a text prompt and, for pictures, image: a path or some"
            )
            continue
        images = [str(file.parent / image) for image in images]
        problems += [f"line {number}: {why}" for image in images if (why := image_problem(image))]
        requests.append({**request, "image": images})
    if not requests and not problems:
        raise UserError(f"--requests {path}: the file is empty; write one JSON request a line.")
    if problems:
        raise UserError(
            f"--requests {path}: {'; '.join(problems[:3])}"
            f"{f'; and {len(problems) - 3:,} more problems' if len(problems) > 3 else ''}."
        )
    return requests


@functools.lru_cache(maxsize=100_000)
def image_problem(path: str) -> str | None:
    from oq2vl_jax.data.samples.images import ImageError, check_image

    if not Path(path).is_file():
        return f"no image {path}"
    try:
        check_image(Path(path).read_bytes())
    except ImageError as problem:
        return f"{path}: {problem}"
    return None


def check(config: GenerateConfig) -> None:
    check_bounds(config, as_flags=True)
    if (config.requests is None) == (config.prompt is None):
        raise UserError("give either --prompt (with --image) or --requests.")
    if config.requests is not None and config.out is None:
        raise UserError("--requests needs --out, the file to write the predictions to.")
    if config.requests is not None and config.image:
        raise UserError("--image goes with --prompt; the images of --requests stand in the file.")
    if config.prompt is not None and config.out is not None:
        raise UserError("--out goes with --requests; a single reply is printed.")
    check_local("--out", config.out)
    if config.out is not None and not Path(config.out).absolute().parent.is_dir():
        raise UserError(f"--out {config.out}: its folder does not exist.")
    if config.out is not None and Path(config.out).is_dir():
        raise UserError(f"--out {config.out}: is a folder; give a file.")
    for name, text in (("--prompt", config.prompt), *(("--stop", text) for text in config.stop)):
        if text is not None and not is_utf8(text):
            raise UserError(f"{name} is no UTF-8; is the terminal or script set to another encoding?")
    missing = [image for image in config.image if not Path(image).is_file()]
    if missing:
        raise UserError(f"--image {missing[0]}: no such file.")


def is_utf8(text: str) -> bool:
    """False for an argument with bytes that are none, which Python holds as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def main() -> None:

    config = parse(GenerateConfig, prog="python -m oq2vl_jax.generate")
    check(config)
    from oq2vl_jax.data.samples.images import ImageError

    requests = read_requests(config.requests) if config.requests else None
    from oq2vl_jax.eval.generator import Generator, Request
    from oq2vl_jax.eval.reply import SamplingOptions

    options = SamplingOptions(
        config.max_new_tokens, config.temperature, config.top_p, config.top_k, config.seed, config.stop
    )
    generator = Generator(config.checkpoint, config.template, prompt_form=config.prompt_form)
    try:
        if requests is None:
            prompt = generator.encode_prompt(config.prompt or "", len(config.image))
            for piece in generator.stream(Request(prompt, read_images(config.image)), options):
                print(piece, end="", flush=True)
            print()
        else:
            write_predictions(generator, requests, options, config)
    except ImageError as problem:
        raise UserError(f"an image cannot be used: {problem}.") from problem


def write_predictions(
    generator: "Generator", requests: list[dict], options: "SamplingOptions", config: GenerateConfig
) -> None:
    """OUT holds the predictions in the order of the requests when all are there; OUT.partial those so far, in the order
    in which they came. The same command goes on from there."""
    from rich.console import Console
    from rich.progress import track

    partial = Path(f"{config.out}.partial")
    settings = settings_of(generator, requests, options)
    answered = predictions_so_far(partial, settings)
    left = [i for i in range(len(requests)) if i not in answered]
    if answered:
        print(f"{len(answered):,} of {len(requests):,} were answered before", file=sys.stderr)
    predictions = answer_requests(generator, [requests[i] for i in left], options, config.batch_size)
    if sys.stderr.isatty():
        predictions = track(predictions, "answering", total=len(left), console=Console(stderr=True))
    with partial.open("a" if answered else "w") as stream:
        if not answered:
            stream.write(json.dumps({"settings": settings}) + "\n")
        for k, prediction in predictions:
            answered[left[k]] = prediction
            stream.write(json.dumps({"number": left[k], "prediction": prediction}) + "\n")
            stream.flush()
    with whole_output(str(config.out)) as whole:
        whole.write_text("".join(json.dumps(answered[i]) + "\n" for i in range(len(requests))))
    partial.unlink()
    print(f"{len(requests)} replies written to {config.out}")


def settings_of(generator: "Generator", requests: list[dict], options: "SamplingOptions") -> str:
    """Identity of what the predictions depend on; the pictures count by size and time of change."""
    pictures = {path: file_version(path) for request in requests for path in request["image"]}
    values = [
        generator.checkpoint,
        generator.template,
        generator.prompt_form,
        generator.dtype,
        dataclasses.asdict(options),
        requests,
        pictures,
    ]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def predictions_so_far(partial: Path, settings: str) -> dict[int, dict]:
    from oq2vl_jax.eval.jsonl import read_whole_lines

    try:
        head, *lines = read_whole_lines(partial) or [{}]
        found = {line["number"]: line["prediction"] for line in lines}
    except (ValueError, KeyError, TypeError):
        head, found = {}, {}
    if partial.exists() and head != {"settings": settings}:
        print(f"{partial} is of other requests or settings, and is begun anew", file=sys.stderr)
        return {}
    return found


if __name__ == "__main__":
    run_command(main)
