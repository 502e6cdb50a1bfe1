"""Makes thumbnails for the HTML pages."""

import base64
import html
import io

from oq2vl_jax.data.samples.images import ImageError, open_rgb

THUMBNAIL_PIXELS = 220


def picture(data: bytes, caption: str, note: str = "") -> str:
    """Returns HTML of a thumbnail with its caption; if the image does not decode, the error takes its place."""
    try:
        image = open_rgb(data)
        image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        source = base64.b64encode(buffer.getvalue()).decode()
        shown = f'<img alt="" src="data:image/jpeg;base64,{source}">'
    except ImageError as problem:
        shown = f'<p class="bad">{html.escape(str(problem))}</p>'
    note_line = f'<br><span class="lead">{html.escape(note)}</span>' if note else ""
    return f"<figure>{shown}<figcaption>{html.escape(caption)}{note_line}</figcaption></figure>"
