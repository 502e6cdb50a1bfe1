"""transformers' generate on an exported model, to measure oq2vl_jax.eval against (python -m oq2vl_jax.bench decode)."""

import io
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


class TransformersPeer:
    """An exported model that writes a fixed number of tokens, greedily, in float32."""

    def __init__(self, folder: str):
        self._model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self._processor = AutoProcessor.from_pretrained(folder)

    def generate(self, prompts: Sequence[list[int]], images: Sequence[bytes], num_tokens: int) -> list[list[int]]:
        """New tokens of prompts of one length, each with one image; the end of a turn does not end a reply."""
        processor = self._processor.image_processor
        pixels = processor(images=[Image.open(io.BytesIO(data)) for data in images], return_tensors="pt")
        tokens = torch.tensor(list(prompts))
        with torch.no_grad():
            written = self._model.generate(  # pyright: ignore[reportAttributeAccessIssue]
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                pixel_values=pixels["pixel_values"],
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
            )
        return written[:, tokens.shape[1] :].tolist()

    def with_requests(self, prompt: list[int], images: Sequence[bytes]) -> Callable[[int], object]:
        """A function of the number of tokens to write."""
        return lambda num_tokens: self.generate([prompt] * len(images), images, num_tokens)
