"""Runs transformers' generate as the baseline of our decoding: on an exported model (bench decode) and on random
weights (bench report)."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2Config, Qwen2ForCausalLM

from oq2vl_jax.config import DecoderConfig


class TransformersPeer:
    """An exported model that writes a fixed number of tokens, greedily, in float32."""

    def __init__(self, folder: str):
        self._model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self._processor = AutoProcessor.from_pretrained(folder)

    def generate(self, prompts: Sequence[list[int]], images: Sequence[bytes], num_tokens: int) -> list[list[int]]:
        """Returns num_tokens new tokens per prompt; stop tokens do not end it. Prompts: one length, one image each."""
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
        """Returns a function that takes the number of tokens and generates them for the prompt with each image."""
        return lambda num_tokens: self.generate([prompt] * len(images), images, num_tokens)


class RandomDecoder:
    """transformers' Qwen2 with random weights in bfloat16, on a GPU if torch finds one."""

    def __init__(self, decoder: DecoderConfig):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = Qwen2Config(
            vocab_size=decoder.vocab_size, hidden_size=decoder.hidden_size,
            intermediate_size=decoder.intermediate_size, num_hidden_layers=decoder.num_layers,
            num_attention_heads=decoder.num_heads, num_key_value_heads=decoder.num_kv_heads,
            tie_word_embeddings=decoder.tie_word_embeddings,
        )  # fmt: skip
        with torch.device(self.device):
            self._model: Any = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        self._model.eval()

    def generate(self, batch: int, num_prompt: int, num_new: int) -> None:
        """Generates num_new tokens greedily after each of `batch` prompts of num_prompt tokens and waits for them."""
        tokens = torch.ones(batch, num_prompt, dtype=torch.long, device=self.device)
        with torch.no_grad():
            self._model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=num_new,
                min_new_tokens=num_new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            ).cpu()
