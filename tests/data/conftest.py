"""Small shards made on the fly."""

import base64
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from oq2vl_jax.data.packing.documents import Limits
from oq2vl_jax.data.text.codec import TextCodec


def png(width=24, height=20, seed=0, image_format="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def caption_sample(i, text=None, image=None):
    return {
        "__key__": f"{i:06d}",
        "png": png(seed=i) if image is None else image,
        "txt": (text or f"picture number {i}").encode(),
    }


def conversation_sample(i, question="<image>\nWhat?", answer="That.", images=1):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    pictures = {f"{slot}.jpg": png(seed=i + slot, image_format="JPEG") for slot in range(images)}
    return {"__key__": f"{i:06d}", **pictures, "json": json.dumps({"conversations": turns}).encode()}


LIMITS = Limits("plain", 400, 10, 4)


@pytest.fixture(scope="module")
def codec(byte_tokenizer_folder):
    return TextCodec.from_transformers(byte_tokenizer_folder)


def tar_of(path, members, sizes=None):
    """A tar of (name, bytes) or ready TarInfos; `sizes` puts a lie into the header of a name."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    if sizes:
        content = bytearray(path.read_bytes())
        for name, size in sizes.items():
            start = content.index(name.encode() + b"\0")
            header = tarfile.TarInfo.frombuf(bytes(content[start : start + 512]), "utf-8", "strict")
            header.size = size
            content[start : start + 512] = header.tobuf(tarfile.USTAR_FORMAT)
        path.write_bytes(content)
    return str(path)


def caption_members(i, **changes):
    sample = {**caption_sample(i), **changes}
    return [(f"{sample['__key__']}.{suffix}", sample[suffix]) for suffix in ("png", "txt")]


def encoded(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def embedded(data):
    return {"image_base64": base64.b64encode(data).decode()}
