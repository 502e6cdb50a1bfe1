"""Loads tokenizer folders with this project's special tokens, and identifies them by a digest."""

import hashlib
import json
from pathlib import Path
from typing import Any

from oq2vl_jax.errors import UserError

BOS, EOS, PAD, END_OF_CHUNK = "<s>", "<|im_end|>", "<|endoftext|>", "<|endofchunk|>"
TURN_START, IMAGE_PAD = "<|im_start|>", "<|image_pad|>"


def load_tokenizer(folder: str):
    """Loads a Hugging Face tokenizer from a local folder and declares <s>, <|endofchunk|> and <|image_pad|> special.

    In Qwen2.5 <s> is already a BPE entry (128245) and keeps that id; <|endofchunk|> becomes 151665. <|image_pad|>
    exists already; it is added to older tokenizers of the family. Raises UserError.
    """
    import transformers

    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; a Hugging Face tokenizer folder is expected.")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not parts_text_as_saved(tokenizer, Path(folder) / "tokenizer.json"):
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # for a broken file the Rust library raises a plain Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: no tokenizer could be loaded: {reason}") from error
    tokenizer.add_tokens([END_OF_CHUNK, BOS, IMAGE_PAD], special_tokens=True)
    return tokenizer


def parts_text_as_saved(tokenizer: Any, file: Path) -> bool:
    """Returns whether a tokenizer normalises and splits text as its tokenizer.json says. transformers 5 takes only the
    vocabulary and the merges from that file, and the rest from the class that tokenizer_config.json names."""
    if not file.is_file():
        return True
    saved, built = json.loads(file.read_bytes()), json.loads(tokenizer.backend_tokenizer.to_str())
    return all(saved.get(part) == built.get(part) for part in ("normalizer", "pre_tokenizer"))


def tokenizer_sha256(folder: Path) -> str:
    """Returns the identity of a saved tokenizer; packed rows and model must share one.

    The hash covers the parts that decide the ids (vocabulary, merges, added tokens, normalizer, pre-tokenizer), not
    the bytes of the file: transformers writes the same tokenizer in more than one way, for example if a model's
    config.json lies beside it. Raises UserError.
    """
    file = folder / "tokenizer.json"
    try:
        saved = json.loads(file.read_bytes())
        model, added = saved["model"], [(token["id"], token["content"]) for token in saved["added_tokens"]]
        if model.get("type") != "BPE":
            raise UserError(f"{folder}: a tokenizer of type {model.get('type')}, expected BPE as Qwen2.5's.")
        identity = [model["vocab"], model["merges"], added, saved["normalizer"], saved["pre_tokenizer"]]
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing; a packed folder or a checkpoint holds its tokenizer.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error}); copy it again.") from error
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
