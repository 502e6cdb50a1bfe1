"""Sizes of published backbones, as their config.json says, for plans without a download (bench fits, --changes)."""

from typing import Literal

from oq2vl_jax.config.model import DecoderConfig, VisionConfig


def _decoder(
    kind: Literal["qwen2", "qwen3"], hidden: int, intermediate: int, layers: int, heads: tuple[int, int, int],
    is_tied: bool = True, vocabulary: int = 151_936,
) -> DecoderConfig:  # fmt: skip
    """heads: query heads, kv heads, width of a head."""
    return DecoderConfig(vocabulary, hidden, intermediate, layers, *heads, tie_word_embeddings=is_tied, kind=kind)


DECODERS = {
    "Qwen2.5-0.5B": _decoder("qwen2", 896, 4864, 24, (14, 2, 64)),
    "Qwen2.5-1.5B": _decoder("qwen2", 1536, 8960, 28, (12, 2, 128)),
    "Qwen2.5-3B": _decoder("qwen2", 2048, 11_008, 36, (16, 2, 128)),
    "Qwen2.5-7B": _decoder("qwen2", 3584, 18_944, 28, (28, 4, 128), is_tied=False, vocabulary=152_064),
    "Qwen3-0.6B": _decoder("qwen3", 1024, 3072, 28, (16, 8, 128)),
    "Qwen3-1.7B": _decoder("qwen3", 2048, 6144, 28, (16, 8, 128)),
    "Qwen3-4B": _decoder("qwen3", 2560, 9728, 36, (32, 8, 128)),
    "Qwen3-8B": _decoder("qwen3", 4096, 12_288, 36, (32, 8, 128), is_tied=False),
}
ENCODERS = {
    "siglip-base-patch16-224": VisionConfig(224, 16, 768, 3072, 12, 12, "gelu_tanh"),
    "siglip-large-patch16-384": VisionConfig(384, 16, 1024, 4096, 24, 16, "gelu_tanh"),
    "siglip-so400m-patch14-384": VisionConfig(384, 14, 1152, 4304, 27, 16, "gelu_tanh"),
}
"""SigLIP2 of a fixed resolution has the same sizes, such as siglip2-base-patch16-224."""
