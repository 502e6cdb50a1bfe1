"""What the machine gives: the matrix products of a step, each alone, by jax and by PyTorch; and a copy.

A ratio to a peer holds on another machine only as far as this does. `python -m tests.peers.machine CONFIG jax` measures
one library in a process of its own and prints JSON; compare.py does so in every round.
"""

import argparse
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from oq2vl_jax.bench.parts.setting import median_seconds
from oq2vl_jax.config import TrainConfig

LIBRARIES = ("jax", "torch")
FORMS = {"forward": "tk,kn->tn", "input": "tn,kn->tk", "kernel": "tk,tn->kn"}
"""The product of a linear map, and those of its gradients by its input and by its kernel."""


class Product(NamedTuple):
    """rows: tokens, patches or positions. times: in a step."""

    name: str
    form: str
    rows: int
    inputs: int
    outputs: int
    times: float

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inputs * self.outputs

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        sizes = {"t": self.rows, "k": self.inputs, "n": self.outputs}
        left, right = FORMS[self.form].split("->")[0].split(",")
        return (sizes[left[0]], sizes[left[1]]), (sizes[right[0]], sizes[right[1]])


def products_of(config: TrainConfig, num_images: float, num_labelled: float) -> list[Product]:
    """The products of a step whose encoder is frozen, but the projector's (under 1 %). num_images, num_labelled: of all
    rows."""
    from oq2vl_jax.model.open_qwen2vl import IMAGES_PER_CHUNK
    from oq2vl_jax.train.gradients import chunk_size

    decoder, vision = config.model.decoder, config.model.vision
    rows = config.rows_per_device or config.global_batch_size
    microbatches, tokens = config.global_batch_size / rows, rows * config.data.num_tokens
    width, heads = decoder.hidden_size, decoder.num_heads * decoder.head_dim
    linears = {
        "q, k, v": (width, heads + 2 * decoder.num_kv_heads * decoder.head_dim), "o": (heads, width),
        "gate, up": (width, 2 * decoder.intermediate_size), "down": (decoder.intermediate_size, width),
    }  # fmt: skip
    found = [
        Product(name, form, tokens, *sizes, decoder.num_layers * microbatches)
        for name, sizes in linears.items() for form in FORMS
    ]  # fmt: skip
    chunk = chunk_size(tokens)
    found += [Product("logits", form, chunk, width, decoder.vocab_size, num_labelled / chunk) for form in FORMS]
    images = min(IMAGES_PER_CHUNK, rows * config.data.max_images)
    chunks = microbatches * math.ceil(num_images / microbatches / images)
    patches, blocks = images * vision.num_patches, vision.num_layers - 1
    of_block = {
        "encoder q, k, v, o": (vision.hidden_size, vision.hidden_size, 4),
        "encoder fc1": (vision.hidden_size, vision.intermediate_size, 1),
        "encoder fc2": (vision.intermediate_size, vision.hidden_size, 1),
    }
    return found + [
        Product(name, "forward", patches, inputs, outputs, number * blocks * chunks)
        for name, (inputs, outputs, number) in of_block.items()
    ]


def measured(products: list[Product], library: str) -> dict[str, float]:
    """{"seconds": of all products of a step, "gflops": their rate, "slowest": the rate of the slowest form, ..}."""
    rng, seconds = np.random.default_rng(0), []
    for product in products:
        arrays = [rng.standard_normal(shape, np.float32) for shape in product.shapes]
        seconds.append(median_seconds(product_by(library, FORMS[product.form], arrays)))
    total = sum(product.times * spent for product, spent in zip(products, seconds, strict=True))
    flops = sum(product.times * product.flops for product in products)
    slowest = min(zip(products, seconds, strict=True), key=lambda pair: pair[0].flops / pair[1])
    return {
        "seconds": total,
        "gflops": flops / total / 1e9,
        "slowest_gflops": slowest[0].flops / slowest[1] / 1e9,
        "slowest": f"{slowest[0].name}, {slowest[0].form}",  # type: ignore[dict-item]
    }


def product_by(library: str, form: str, arrays: list[np.ndarray]) -> Callable[[], Any]:
    if library == "torch":
        import torch

        tensors = [torch.from_numpy(array) for array in arrays]
        return lambda: torch.einsum(form, *tensors)
    import jax

    on_device = [jax.numpy.asarray(array) for array in arrays]
    multiply = jax.jit(lambda a, b: jax.numpy.einsum(form, a, b))
    return lambda: multiply(*on_device).block_until_ready()


def main() -> None:
    from oq2vl_jax.bench.parts.device import CPU_COPY_BYTES, copy_rate
    from oq2vl_jax.bench.step import Step, configured
    from oq2vl_jax.bench.synthetic_rows import make_rows
    from oq2vl_jax.train.metrics import work_of

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--global-rows", type=int)
    options = parser.parse_args()
    config = configured(Step(options.config, global_rows=options.global_rows))
    work = work_of(make_rows(config, config.global_batch_size), config)
    figures = measured(products_of(config, work.images, work.labelled), options.library)
    if options.library == "jax":
        figures["copy_gb_per_second"] = copy_rate(CPU_COPY_BYTES) / 1e9
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
