"""Measures reading of packed rows: random rows per second; images per second and core, against a plain decode loop."""

import dataclasses
import io
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from oq2vl_jax.bench.photo_shards import write_photo_shards
from oq2vl_jax.bounds import Count, Seed, SmallCount
from oq2vl_jax.config import DataConfig, ModelConfig


@dataclass(frozen=True)
class Rows:
    """Random access to packed rows and decoding of their images, one thread."""

    tokenizer: str
    """Hugging Face tokenizer folder."""
    num_samples: SmallCount = 1000
    repeats: Count = 3
    seed: Seed = 0
    json: bool = False


OPTIONS = Rows


def measure(config: Rows) -> list[dict]:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    from oq2vl_jax.data.loading.loader import RowDecoder
    from oq2vl_jax.data.packing.packer import PackConfig, pack_shards
    from oq2vl_jax.data.packing.rows import decode_row
    from oq2vl_jax.jobs import Execution

    model = ModelConfig.open_qwen2vl_2b()
    data = DataConfig(num_tokens=4096, max_images=28, template="plain", num_threads=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photo_shards(folder, 1, config.num_samples, config.seed)
        execution, out = Execution(num_workers=1), str(folder / "rows")
        manifest = pack_shards(
            PackConfig(f"{folder}/*.tar", out, config.tokenizer, template="plain", execution=execution)
        )
        assert manifest is not None
        source = ArrayRecordDataSource([str(folder / "rows" / manifest["files"][0]["file"])])
        model = dataclasses.replace(model, image_token_id=manifest["image_id"])
        decoder = RowDecoder(data, model, manifest["pad_id"])
        order = random.Random(config.seed).choices(range(len(source)), k=20 * len(source))
        read = [seconds_of(lambda: [source[i] for i in order]) for _ in range(config.repeats)]
        num_images, ours, plain = 0, 0.0, 0.0
        for _ in range(config.repeats):
            for i in range(len(source)):  # in turns, row by row, so that other load slows both
                element = source[i]
                images = decode_row(element).images
                plain += seconds_of(lambda images=images: [plain_decode(x, model.vision.image_size) for x in images])
                ours += seconds_of(lambda element=element: decoder.map(element))
                num_images += len(images)
    rates = {
        "random rows": len(order) / min(read),
        "images, rows to batch arrays": num_images / ours,
        "images, plain decode loop": num_images / plain,
    }
    plain_rate = rates["images, plain decode loop"]
    return [
        {"what": label, "per_second": rate, "of_plain": rate / plain_rate if label.startswith("images") else ""}
        for label, rate in rates.items()
    ]


def seconds_of(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def plain_decode(data: bytes, size: int) -> np.ndarray:
    """Decodes and resizes an image with PIL alone, as a baseline."""
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)
