"""Checking images when they are packed, decoding them when they are trained on.

Resizing follows the published preprocessing: RGB, bicubic with antialiasing (PIL), to a square, aspect ignored.
"""

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000
"""An image with more pixels is refused from its header, before it is decoded (decompression bombs)."""


class ImageError(ValueError):
    """An image that cannot be used. `reason` is the name it is counted under."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def check_image(data: bytes) -> None:
    """Raises ImageError unless `data` decodes to the end, is larger than 1x1 and at most MAX_PIXELS.

    JPEGs are decoded at an eighth of their size (`draft`), which still reads every coded bit.
    """
    image = _open(data)
    if image.format == "JPEG":
        image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
    _load(image)


def decode_image(data: bytes, size: int) -> np.ndarray:
    """uint8 [size, size, 3]. Raises ImageError for what check_image would have refused."""
    image = _open(data)
    _load(image)
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _open(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError("image_too_large", str(error)) from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise ImageError("image_undecodable", str(error)) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError("image_too_large", f"{width}x{height}, at most {MAX_PIXELS} pixels")
    if width <= 1 or height <= 1:
        raise ImageError("image_too_small", f"{width}x{height}")
    return image


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # what PIL raises for truncated and corrupt files
        raise ImageError("image_undecodable", str(error)) from error
