"""python -m oq2vl_jax.generate: asks a checkpoint one question or a file of questions.

    python -m oq2vl_jax.generate --checkpoint runs/tiny --image cat.png --prompt "what is the blue shape?"
    python -m oq2vl_jax.generate --checkpoint runs/tiny --requests test.jsonl --out predictions.jsonl

A request is {"prompt": text, "image": path or list of paths, relative to the file, ...}; a prediction is the request
with "reply" and "finish_reason" added. Requests are answered in batches of similar length; the order of the file is
kept. Predictions are written as they complete, and the same command resumes an interrupted run. The reply to a single
prompt is printed as it is generated.
"""

from dataclasses import fields

from oq2vl_jax.bounds import parse
from oq2vl_jax.errors import UserError, run_command
from oq2vl_jax.generate.options import GenerateConfig, check
from oq2vl_jax.generate.requests import read_images, read_requests, write_predictions


def main() -> None:
    config = parse(GenerateConfig, prog="python -m oq2vl_jax.generate")
    check(config)
    from oq2vl_jax.data.samples.images import ImageError

    requests = read_requests(config.requests) if config.requests else None
    from oq2vl_jax.generate.generator import Generator, Request
    from oq2vl_jax.generate.reply import SamplingOptions

    options = SamplingOptions(**{field.name: getattr(config, field.name) for field in fields(SamplingOptions)})
    generator = Generator(
        config.checkpoint,
        config.template,
        prompt_form=config.prompt_form,
        weights=config.weights,
        projector=config.projector,
    )
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


if __name__ == "__main__":
    run_command(main)
