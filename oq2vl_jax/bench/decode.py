"""Measures generation against transformers' generate on the exported model: same weights, prompts, images, in turns."""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from oq2vl_jax.bounds import Count, Length, Seed, SmallCount
from oq2vl_jax.command import bridge
from oq2vl_jax.config import CheckpointDescription, DecoderConfig, ModelConfig, VisionConfig
from oq2vl_jax.errors import UserError

VISION = VisionConfig(image_size=64, patch_size=8, hidden_size=64, intermediate_size=256, num_layers=3, num_heads=2)
DECODERS = {
    "tiny": DecoderConfig(8256, 128, 384, 3, 2, 1, 64),
    "0.5b": DecoderConfig(151_936, 896, 4864, 24, 14, 2, 64),
}
"""The demo's decoder, and Qwen2.5-0.5B's."""
IMAGE_TOKEN = 268
"""Id of the image token in the byte tokenizer."""


@dataclass(frozen=True)
class Decode:
    """New tokens per second in float32, greedy: of decoding alone, and including prompt and picture."""

    shapes: tuple[str, ...] = ("tiny", "0.5b")
    batch_sizes: tuple[SmallCount, ...] = (1, 8)
    num_tokens: Length = 48
    prompt_characters: Length = 64
    repeats: Count = 5
    seed: Seed = 0
    json: bool = False


OPTIONS = Decode


def measure(config: Decode) -> list[dict]:
    unknown = [shape for shape in config.shapes if shape not in DECODERS]
    if unknown:
        raise UserError(f"--shapes: no shape {unknown[0]!r}; there are {', '.join(DECODERS)}.")
    results = []
    for shape in config.shapes:
        with tempfile.TemporaryDirectory() as folder:
            results += measure_shape(config, shape, Path(folder))
    return results


def measure_shape(config: Decode, shape: str, folder: Path) -> list[dict]:
    import jax.numpy as jnp

    from oq2vl_jax.generate.generator import Generator, Request
    from oq2vl_jax.generate.reply import SamplingOptions

    to_hf, TransformersPeer = bridge("to_hf"), bridge("time_hf").TransformersPeer
    write_random_checkpoint(folder / "checkpoint", DECODERS[shape], config.seed)
    to_hf.export(to_hf.ToHFConfig(str(folder / "checkpoint"), str(folder / "exported"), dtype="float32", native=True))
    theirs, generator = TransformersPeer(str(folder / "exported")), Generator(str(folder / "checkpoint"))
    generator.stop_tokens, generator.stops = jnp.array([-2]), set()
    options = SamplingOptions(config.num_tokens)
    results = []
    for batch_size in config.batch_sizes:
        prompt = generator.encode_prompt("x" * config.prompt_characters, 1)
        images = [noise_png(i) for i in range(batch_size)]
        requests = [Request(prompt, [image]) for image in images]
        written = [reply.tokens for reply in generator.generate(requests, options)]  # compiles
        expected = theirs.generate([prompt] * batch_size, images, config.num_tokens)
        sides = {"ours": OurSide(generator, requests), "transformers": theirs.with_requests(prompt, images)}
        seconds = {(side, n): [] for side in sides for n in (1, config.num_tokens)}
        for _ in range(config.repeats):
            for (side, num_tokens), times in seconds.items():
                start = time.perf_counter()
                sides[side](num_tokens)
                times.append(time.perf_counter() - start)
        results.append(
            {"shape": shape, "batch": batch_size, "same tokens": written == expected}
            | rates(seconds, batch_size, config)
        )
    return results


class OurSide:
    """Generates num_tokens tokens for every request; each call encodes the pictures again."""

    def __init__(self, generator, requests):
        self._generator, self._requests = generator, requests
        self(1)  # compiles

    def __call__(self, num_tokens: int) -> None:
        from oq2vl_jax.generate.reply import SamplingOptions

        self._generator._visual_tokens.clear()
        self._generator.generate(self._requests, SamplingOptions(num_tokens))


def rates(seconds: dict[tuple[str, int], list[float]], batch_size: int, config: Decode) -> dict[str, float]:
    """Returns tokens per second from prompt to end ("whole"), and of the tokens after the first ("decoding")."""
    median = {key: statistics.median(runs) for key, runs in seconds.items()}
    rate = {}
    for side in ("ours", "transformers"):
        whole, first = median[side, config.num_tokens], median[side, 1]
        rate[side, "whole"] = batch_size * config.num_tokens / whole
        rate[side, "decoding"] = batch_size * (config.num_tokens - 1) / (whole - first)
    return {
        f"{part}: {name}": value
        for part in ("decoding", "whole")
        for name, value in (
            ("ours", rate["ours", part]),
            ("transformers", rate["transformers", part]),
            ("ratio", rate["ours", part] / rate["transformers", part]),
        )
    }


def write_random_checkpoint(folder: Path, decoder: DecoderConfig, seed: int) -> None:
    """Writes random weights and a byte tokenizer in the form of a converted checkpoint."""
    import jax
    import numpy as np

    stream = bridge("checkpoint_stream")
    from oq2vl_jax.data.text.bpe import BYTE_RANKS, save_bpe_tokenizer
    from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
    from oq2vl_jax.trees import named_arrays

    model = ModelConfig(VISION, decoder, VISION.num_patches, IMAGE_TOKEN)
    shapes = named_arrays(jax.eval_shape(lambda: OpenQwen2VL(jax.random.key(0), model)))
    rng = np.random.default_rng(seed)

    def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
        drawn = rng.standard_normal(shape, np.float32)
        return 1 + 0.1 * drawn if name.endswith(("norm.scale", "layernorm.scale")) else drawn * shape[-1] ** -0.5

    arrays = {
        name: stream.LazyArray(x.shape, lambda name=name, x=x: values(name, x.shape)) for name, x in shapes.items()
    }
    with tempfile.TemporaryDirectory() as tokenizer:
        save_bpe_tokenizer(BYTE_RANKS, tokenizer)
        stream.save_checkpoint(folder, arrays, CheckpointDescription(model, "chatml", "random"), Path(tokenizer))


def noise_png(seed: int) -> bytes:
    import io

    import numpy as np
    from PIL import Image

    size = VISION.image_size
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
