"""Small shards made on the fly."""

import io
import json

import numpy as np
from PIL import Image


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
