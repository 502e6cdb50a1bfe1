"""Checks images when they are packed, and decodes them for training.

Resizing follows the published preprocessing: RGB, bicubic with antialiasing (PIL), to a square, aspect ignored.
The first frame of an animation is used, as in the published code. Deviation: 16-bit grey is scaled to 8 bits, while
PIL's own conversion to RGB clips it to white.
"""

import base64
import binascii
import io
import warnings

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Detected by content; the name's suffix is ignored, because pictures are often renamed."""
MAX_SCANS = 100
"""Scans of a progressive JPEG: each is a pass over the picture, and 200 kB of repeated scans took 20 seconds."""
ORIENTATION = 0x0112
"""EXIF tag; 1 is upright."""
MAX_PIXELS = 50_000_000
"""An image with more pixels is refused from its header, before it is decoded (decompression bombs)."""
JPEG_QUALITY = 95
"""For TIFF pages, the only images that packing re-encodes: PNGs of scanned pages would be ten times as large."""
MAX_PAGES = 256


class ImageError(ValueError):
    """An image that cannot be used. `reason` is the name it is counted under."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def check_image(data: bytes) -> list[str]:
    """Raises ImageError unless `data` decodes to the end, is at least 2x2 and has at most MAX_PIXELS.

    Returns notes: image_animated, image_cmyk, image_16_bit, image_to_be_turned (by its EXIF
    orientation), image_transparent. JPEGs are decoded at an eighth of their size and without colour (`draft`), which
    still reads every coded bit, in half the time.
    """
    image = _open(data)
    notes = ["image_animated"] if getattr(image, "is_animated", False) else []
    notes += ["image_cmyk"] if image.mode == "CMYK" else []
    notes += ["image_16_bit"] if _is_16_bit(image) else []
    if image.format == "JPEG":
        image.draft("L", (max(1, image.width // 8), max(1, image.height // 8)))
    _load(image)  # before _orientation: for EXIF data PIL decodes a PNG, and may fail
    notes += ["image_to_be_turned"] if _orientation(image) not in (None, 1) else []
    notes += ["image_transparent"] if image.has_transparency_data else []
    return notes


def image_size(data: bytes) -> tuple[int, int]:
    """Returns (width, height) in pixels from the header. Raises ImageError."""
    return _open(data).size


def decode_image(data: bytes, size: int, is_exact: bool = True, as_seen: bool = False) -> np.ndarray:
    """Returns uint8 [size, size, 3]. Raises ImageError for images that check_image refuses.

    as_seen: turns the image by its EXIF orientation and puts transparent parts on white, as viewers show it. The
    published code does neither.
    is_exact False: a JPEG at least twice as large as wanted is halved, quartered, ... while it is decoded, which takes
    a half to a quarter of the time; smaller ones come out the same.
    """
    image = _open(data)
    if not is_exact:
        image.draft("RGB", (size, size))  # does nothing to other formats, nor to an image less than twice as large
    image = _to_rgb(_as_seen(_load(image)) if as_seen else _load(image))
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def open_rgb(data: bytes) -> Image.Image:
    """Decodes an image in its own size, as RGB. Raises ImageError."""
    return _to_rgb(_load(_open(data)))


def embedded_image(text: str) -> bytes | None:
    """Decodes the base64 of an interleaved document's image; None if width or height is 1, as in the published code."""
    return larger_than_a_pixel(decode_base64(text))


def decode_base64(text: str) -> bytes:
    """Returns the bytes of an image in base64. Raises ImageError."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ImageError("image_undecodable", "it is no base64") from error


def larger_than_a_pixel(data: bytes) -> bytes | None:
    """Returns the image; None if width or height is 1. Raises ImageError if it is no image."""
    try:
        _open(data)
    except ImageError as problem:
        if problem.reason == "image_too_small":
            return None
        raise
    return data


def tiff_pages(data: bytes) -> list[bytes | None]:
    """Returns the pages of a TIFF as JPEGs, bilevel ones as PNGs; None if width or height is 1. Raises ImageError."""
    image = _open(data, ("TIFF",), checks_size=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            num_pages = getattr(image, "n_frames", 1)
    except Exception as error:  # as in _open
        raise ImageError("image_undecodable", "its data are damaged or cut off") from error
    if num_pages > MAX_PAGES:
        raise ImageError("too_many_pages", f"it has {num_pages:,} pages, and at most {MAX_PAGES} are taken")
    return [_page(image, page) for page in range(num_pages)]


def _page(image: Image.Image, page: int) -> bytes | None:
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.seek(page)
        if min(image.size) <= 1:
            return None
        _check_size(image)
        if image.mode == "1":
            image.save(buffer, "PNG")
        else:
            _to_rgb(_load(image)).save(buffer, "JPEG", quality=JPEG_QUALITY)
    except ImageError:
        raise
    except Exception as error:  # as in _open
        raise ImageError("image_undecodable", f"its page {page + 1} is damaged or cut off") from error
    return buffer.getvalue()


def _open(data: bytes, formats: tuple[str, ...] = FORMATS, checks_size: bool = True) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decompression bombs (the limit below is stricter), odd EXIF data
            image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise ImageError("image_too_large", f"it has more than {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # PIL's parsers raise errors of every kind on broken files
        raise ImageError("image_undecodable", f"it is damaged or none of {', '.join(FORMATS)}") from error
    if checks_size:
        _check_size(image)
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
        raise ImageError("image_of_too_many_scans", f"it is a JPEG of more than {MAX_SCANS} scans")
    return image


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            "image_too_large", f"it has {width:,} x {height:,} pixels, and at most {MAX_PIXELS:,} are taken"
        )
    if width <= 1 or height <= 1:
        raise ImageError("image_too_small", f"it has {width:,} x {height:,} pixels, and both sides must be at least 2")


def _load(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except Exception as error:  # as in _open
        raise ImageError("image_undecodable", "its data are damaged or cut off") from error
    return image


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF data raise errors of every kind, and viewers show such pictures as they are
        return None


def _as_seen(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)  # read first, because the image on white loses it
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    turned = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
              7: "TRANSVERSE", 8: "ROTATE_90"}.get(orientation or 1)  # fmt: skip
    return image.transpose(Image.Transpose[turned]) if turned else image


def _is_16_bit(image: Image.Image) -> bool:
    """Returns whether an image is grey of more than 8 bits; PIL itself reads 16-bit colour as 8 bits."""
    return image.mode == "I" or image.mode.startswith("I;16")


def _to_rgb(image: Image.Image) -> Image.Image:
    if _is_16_bit(image):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
