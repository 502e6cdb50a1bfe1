"""Scores captions with a CLIP: the cosine similarity of image and text, -1..1, in the column clip_score."""

import jax
import numpy as np
from PIL import Image

from oq2vl_jax import paths
from oq2vl_jax.checkpoint import open_checkpoint
from oq2vl_jax.config import MeshConfig
from oq2vl_jax.config_files import from_dict
from oq2vl_jax.data.samples.images import open_rgb
from oq2vl_jax.data.samples.shards import Sample
from oq2vl_jax.errors import UserError
from oq2vl_jax.model.clip import Clip
from oq2vl_jax.model.clip_config import ClipDescription
from oq2vl_jax.sharding import make_mesh, replicated, row_sharding
from oq2vl_jax.weights import load_weights

COLUMN = "clip_score"
MAX_ASPECT = 20
"""Images with a larger aspect ratio are cropped before they are resized, because a strip of 1,000,000 x 2 would become
25 billion pixels. Pixels differ by one grey level at most from those of resizing first."""


class ClipScorer:
    """Scores batches of a fixed size on all devices."""

    columns = (COLUMN,)

    def __init__(self, checkpoint: str, batch_size: int):
        """Raises UserError for a folder that convert.from_clip did not write."""
        import transformers

        folder = open_checkpoint(checkpoint)
        file = folder / "description" / "metadata"
        if not file.exists() or "image_tower" not in paths.read_json(str(file)).get("model", {}):
            raise UserError(f"{checkpoint}: no CLIP; python -m convert.from_clip makes one from Hugging Face weights.")
        self.config = from_dict(ClipDescription, paths.read_json(str(file)), where=str(file)).model
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        mesh = make_mesh(MeshConfig())
        if batch_size % mesh.size:
            raise UserError(f"--batch-size {batch_size} is not a multiple of the {mesh.size} devices.")
        shapes = jax.eval_shape(lambda: Clip(jax.random.key(0), self.config))
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), shapes)
        model, rows = load_weights(folder, like), row_sharding(mesh)
        placed = jax.jit(lambda model, *batch: model(*batch), in_shardings=(None, rows, rows), out_shardings=rows)
        self.similarity = lambda images, tokens: placed(model, images, tokens)
        self.batch_size = batch_size

    def prepare(self, sample: Sample) -> tuple[np.ndarray, list[int]]:
        """Returns (pixels, token ids) of a captioned image. Raises ImageError."""
        assert sample.text is not None
        tokens = self.tokenizer(sample.text, truncation=True, max_length=self.config.max_text_tokens).input_ids
        return crop(sample.images[0], self.config.image_size), tokens

    def score(self, prepared: list[tuple[np.ndarray, list[int]]]) -> list[dict[str, float | None]]:
        """Scores at most batch_size samples. A shorter batch is padded, so that only one program is compiled."""
        size = self.config.image_size
        images = np.zeros((self.batch_size, size, size, 3), np.uint8)
        tokens = np.full((self.batch_size, self.config.max_text_tokens), self.config.eos_id, np.int32)
        for row, (pixels, ids) in enumerate(prepared):
            images[row], tokens[row, : len(ids)] = pixels, ids
        scores = np.asarray(self.similarity(images, tokens))
        return [{COLUMN: float(score)} for score in scores[: len(prepared)]]


def crop(data: bytes, size: int) -> np.ndarray:
    """Resizes the shorter side to `size` (bicubic) and crops the centre, as CLIPImageProcessor does. Returns uint8
    [size, size, 3]."""
    image = open_rgb(data)
    shorter = min(image.size)
    width, height = (max(size, int(size * side / shorter)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    if max(width, height) <= MAX_ASPECT * size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(image.crop((left, top, left + size, top + size)))
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
