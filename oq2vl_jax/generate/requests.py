"""Answers a file of requests in batches, and resumes an interrupted run where it stopped."""

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from oq2vl_jax import paths
from oq2vl_jax.errors import UserError
from oq2vl_jax.generate.options import GenerateConfig
from oq2vl_jax.paths import file_version, whole_output

if TYPE_CHECKING:
    from oq2vl_jax.generate.generator import Generator
    from oq2vl_jax.generate.reply import SamplingOptions

REQUESTS_AT_ONCE = 2048
"""Requests that are sorted by length together, with their images in memory."""


def read_images(names: Iterable[str]) -> list[bytes]:
    return [paths.read_bytes(name) for name in names]


def answer_requests(
    generator: "Generator", requests: list[dict], options: "SamplingOptions", batch_size: int
) -> Iterator[tuple[int, dict]]:
    """Yields (number, prediction) for every request. Images are read for REQUESTS_AT_ONCE requests at a time."""
    from oq2vl_jax.generate.generator import Request

    for first in range(0, len(requests), REQUESTS_AT_ONCE):
        some = requests[first : first + REQUESTS_AT_ONCE]
        contents = {path: paths.read_bytes(path) for request in some for path in request["image"]}
        encoded = [
            Request(generator.encode_prompt(r["prompt"], len(r["image"])), [contents[path] for path in r["image"]])
            for r in some
        ]
        for i, reply in generator.generate_all(encoded, options, batch_size):
            yield first + i, {**some[i], "reply": reply.text.strip(), "finish_reason": reply.finish_reason}


def read_requests(path: str) -> list[dict]:
    """Checks every line and every image before anything is run; reports all problems of the file together."""
    if not paths.is_file(path):
        raise UserError(f"--requests {path}: no such file.")
    requests, problems = [], []
    try:
        lines = paths.read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
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
        images = [paths.beside(path, image) for image in images]
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

    if not paths.is_file(path):
        return f"no image {path}"
    try:
        check_image(paths.read_bytes(path))
    except ImageError as problem:
        return f"{path}: {problem}"
    return None


def write_predictions(
    generator: "Generator", requests: list[dict], options: "SamplingOptions", config: GenerateConfig
) -> None:
    """Writes OUT, in the order of the requests, when all predictions are complete. Until then OUT.partial holds them in
    the order in which they completed; the same command resumes from it."""
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
    """Returns a hash of everything the predictions depend on; images enter by size and modification time."""
    pictures = {path: file_version(path) for request in requests for path in request["image"]}
    values = [
        generator.checkpoint,
        generator.identity,
        generator.weights_name,
        generator.template,
        generator.prompt_form,
        generator.dtype,
        dataclasses.asdict(options),
        requests,
        pictures,
    ]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def predictions_so_far(partial: Path, settings: str) -> dict[int, dict]:
    from oq2vl_jax.jsonl import read_whole_lines

    try:
        head, *lines = read_whole_lines(partial) or [{}]
        predictions = {line["number"]: line["prediction"] for line in lines}
    except (ValueError, KeyError, TypeError):
        head, predictions = {}, {}
    if partial.exists() and head != {"settings": settings}:
        print(f"{partial} is of other requests or settings, and is begun anew", file=sys.stderr)
        return {}
    return predictions
