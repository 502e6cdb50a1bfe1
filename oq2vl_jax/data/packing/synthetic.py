"""Makes the small data set of configs/tiny.py: captioned shapes, through the same tars and packer as real data."""

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

from oq2vl_jax.config import TrainConfig
from oq2vl_jax.data.packing.packer import PackConfig, pack_shards
from oq2vl_jax.data.text.bpe import BYTE_RANKS, save_bpe_tokenizer
from oq2vl_jax.errors import UserError
from oq2vl_jax.jobs import Execution
from oq2vl_jax.paths import write_text

SHAPES = ("circle", "square", "triangle")
COLORS = ("red", "green", "blue", "yellow")


def make_synthetic_source(folder: Path, config: TrainConfig) -> str:
    """Makes and packs data.synthetic.num_documents documents under `folder`, once; returns the packed directory.

    Raises UserError if the folder holds rows of other settings.
    """
    from webdataset.writer import TarWriter

    packed, file = folder / "packed", folder / "synthetic.json"
    seed = config.data.seed_of(config.seed)
    settings = {"num_documents": config.data.synthetic.num_documents, "seed": seed}
    if (packed / "manifest.json").exists():
        if not file.is_file() or json.loads(file.read_text()) != settings:
            raise UserError(f"{folder} holds synthetic rows of other settings; choose another --run-dir, or remove it.")
        return str(packed)
    folder.mkdir(parents=True, exist_ok=True)
    save_bpe_tokenizer(BYTE_RANKS, str(folder / "tokenizer"))
    with TarWriter(str(folder / "00000.tar"), mtime=0) as writer:
        for sample in captioned_shapes(config.data.synthetic.num_documents, seed):
            writer.write(sample)
    write_text(str(file), json.dumps(settings) + "\n")
    pack_shards(
        PackConfig(
            shards=str(folder / "00000.tar"),
            out=str(packed),
            tokenizer=str(folder / "tokenizer"),
            num_tokens=config.data.num_tokens,
            max_images=config.data.max_images,
            visual_tokens=config.model.num_visual_tokens,
            template=config.data.template,
            execution=Execution(num_workers=1),
        )
    )
    return str(packed)


def captioned_shapes(count: int, seed: int) -> Iterator[dict]:
    """Yields WebDataset samples: a 32x32 PNG of one shape, and a caption such as 'a red circle'."""
    from PIL import Image, ImageDraw

    rng = random.Random(seed)
    for i in range(count):
        shape, color = rng.choice(SHAPES), rng.choice(COLORS)
        left, top, size = rng.randrange(12), rng.randrange(12), rng.randrange(12, 20)
        box = (left, top, left + size, top + size)
        image = Image.new("RGB", (32, 32), "white")
        draw = ImageDraw.Draw(image)
        if shape == "circle":
            draw.ellipse(box, fill=color)
        elif shape == "square":
            draw.rectangle(box, fill=color)
        else:
            draw.polygon([(left, top + size), (left + size, top + size), (left + size // 2, top)], fill=color)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        yield {"__key__": f"{i:06d}", "png": buffer.getvalue(), "txt": f"a {color} {shape}".encode()}
