"""Writes the tokenizer of an export so that transformers 4.57 and 5, and software built on them, read it the same way.

transformers 5 saves a class that 4 does not have. Both have Qwen2Tokenizer, which gives the model only input_ids and
attention_mask. If Qwen2Tokenizer splits text differently from tokenizer.json, the export names PreTrainedTokenizerFast
instead, which takes everything from that file.
"""

import json
from pathlib import Path
from typing import Any

QWEN2, GENERAL = "Qwen2Tokenizer", "PreTrainedTokenizerFast"
PROBE = "It's  a\n\n \tTest: café, naïve 12345 你好!?\r\n  end\u00a0x 's'S ﬁ A\u030a"
"""Contractions, runs of blanks, digits, letters that NFC composes, punctuation before line breaks."""


def complete_tokenizer(folder: Path) -> None:
    """Fixes tokenizer_config.json of a saved processor; writes vocab.json, merges.txt and special_tokens_map.json."""
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text())
    values |= {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}
    values["tokenizer_class"] = QWEN2
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    write_json(file, values)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges))
    if not reads_alike(folder):
        write_json(file, values | {"tokenizer_class": GENERAL})
    special = {name: values[name] for name in ("bos_token", "eos_token", "pad_token") if values.get(name)}
    write_json(folder / "special_tokens_map.json", special)


def reads_alike(folder: Path) -> bool:
    """Returns whether Qwen2Tokenizer encodes PROBE to the same ids as tokenizer.json."""
    import tokenizers
    from transformers import Qwen2Tokenizer

    saved = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = Qwen2Tokenizer.from_pretrained(folder)
    return saved.encode(PROBE, add_special_tokens=False).ids == theirs.encode(PROBE, add_special_tokens=False)


def write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
