"""Rows of the published packer: *_packed.json, {"data": [{"texts", "image_info", "key", "uid"}, ...]}."""

import os
from collections.abc import Iterator

from oq2vl_jax import paths
from oq2vl_jax.data.samples.formats.format import Format
from oq2vl_jax.data.samples.formats.instructions import is_instructions
from oq2vl_jax.data.samples.shards import Sample, parse_interleaved, printable
from oq2vl_jax.errors import UserError


def read_packed_json(path: str) -> Iterator[Sample]:
    """Yields the documents of one row of the published packer. One image and text are a caption, as in its reader."""
    content = paths.read_json(path)
    documents = content.get("data") if isinstance(content, dict) else None
    if not isinstance(documents, list) or not all(isinstance(d, dict) and "texts" in d for d in documents):
        raise UserError(
            f'{path}: expected {{"data": [{{"texts", "image_info", ...}}]}}, as *_packed.json files hold it.'
        )
    for i, document in enumerate(documents):
        key = printable(str(document.get("key") or document.get("uid") or f"{os.path.basename(path)}#{i}"))
        sample = parse_interleaved(key, document)
        texts = [text for text in sample.elements or () if text is not None]
        if len(sample.images) == 1 and len(texts) == 1 and sample.elements and sample.elements[0] is None:
            sample = sample._replace(text=texts[0], elements=None)
        yield sample


FORMAT = Format(
    matches=lambda path: path.endswith(".json") and not is_instructions(path),
    read=lambda path, reading: read_packed_json(path),
)
