"""Writes tokenizer folders from byte-pair ranks: Qwen's vocabulary, or its first merges for small models.

Ranks are in the order the merges were learned, so the first n of them are a valid tokenizer with n entries. The
demo's tokenizer has the first 8,192 ranks of Qwen's; that of configs/tiny.py has the 256 bytes only.
"""

import base64
from pathlib import Path

ADDED_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
"""Qwen2.5's added tokens, in its order; their ids follow the ranks (151643..151664 in Qwen2.5)."""

PATTERN = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""

PRINTED_AS_THEMSELVES = {*range(33, 127), *range(161, 173), *range(174, 256)}
"""Bytes that byte-level BPE writes as the character of that number; the others become 256, 257, ... in order."""
BYTE_OF_CHARACTER = {chr(byte): byte for byte in PRINTED_AS_THEMSELVES} | {
    chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - PRINTED_AS_THEMSELVES))
}

BYTE_RANKS = {bytes([byte]): byte for byte in range(256)}


def read_tiktoken_ranks(path: Path, num_ranks: int | None = None) -> dict[bytes, int]:
    """Reads the first `num_ranks` ranks (None: all) of a .tiktoken file: one `base64 rank` per line, in order."""
    lines = path.read_bytes().splitlines()[:num_ranks]
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def save_bpe_tokenizer(ranks: dict[bytes, int], folder: str) -> None:
    """Writes a Hugging Face tokenizer folder: NFC, Qwen's pre-tokenisation, the given ranks, Qwen2.5's added tokens."""
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(vocab_file=folder, pattern=PATTERN, extra_special_tokens=list(ADDED_TOKENS))
    # tiktoken's own reader caches by path, so it would return the old content of a rewritten file
    converter.load_tiktoken_bpe = lambda _: ranks  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = converter.converted()
    tokenizer.normalizer = normalizers.NFC()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.save_pretrained(folder)
