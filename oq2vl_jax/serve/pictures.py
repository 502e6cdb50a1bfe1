"""Reads the pictures of a request: data URLs, and files below a folder that the server allows."""

import base64
import binascii
import re
from pathlib import Path
from urllib.parse import unquote

from oq2vl_jax.data.samples.images import ImageError, check_image
from oq2vl_jax.serve.answers import RequestError

MAX_FILE_BYTES = 20 * 2**20
"""Limit on a picture file below --allow-files."""
BLANKS = str.maketrans("", "", " \t\n\r\f")


def read_image(url: str, where: str, files_root: Path | None) -> bytes:
    """Returns the bytes of a data URL, or of a local file if the server allows it. Raises RequestError, also for an
    image that does not decode."""
    scheme = url[:8].partition(":")[0].lower() if ":" in url[:8] else ""
    if scheme == "data":
        data = read_data_url(url, where)
    elif scheme == "file" or "://" not in url:
        data = read_local_image(url, where, files_root)
    else:
        raise RequestError(f"{where}: {url.partition('://')[0][:20]} images are not fetched; send a data URL")
    try:
        check_image(data)
    except ImageError as problem:
        raise RequestError(f"{where}: the image cannot be used: {problem}") from problem
    return data


def read_data_url(url: str, where: str) -> bytes:
    """Decodes a data URL as the URL standard does: any case, percent-encoding, blanks and line breaks, with or without
    padding. Raises RequestError."""
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().rstrip().endswith("base64") or ";" not in head:
        raise RequestError(f"{where}: a data URL must be data:image/...;base64,...")
    payload = unquote(payload) if "%" in payload else payload
    payload = payload.translate(BLANKS).rstrip("=")
    try:
        return base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{where}: the image's base64 is broken; encode it again") from error


def read_local_image(url: str, where: str, files_root: Path | None) -> bytes:
    path = Path(unquote(re.sub("^file://", "", url, flags=re.IGNORECASE)))
    if files_root is None:
        raise RequestError(f"{where}: local files are not served here (--allow-files DIR allows a folder)")
    try:
        resolved = (files_root / path).resolve()
        if resolved.is_relative_to(files_root.resolve()) and resolved.is_file():
            if resolved.stat().st_size > MAX_FILE_BYTES:
                raise RequestError(f"{where}: the file has more than {MAX_FILE_BYTES:,} bytes")
            return resolved.read_bytes()
    except (ValueError, OSError):  # a name that no file can have: too long, or with a NUL
        pass
    raise RequestError(f"{where}: no such file below the folder that is served")
