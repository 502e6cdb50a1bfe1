"""The manifest of a packed folder, parsed and checked."""

import json
from typing import Any

from oq2vl_jax.errors import UserError

KEYS = {"files": list, "num_tokens": int, "max_images": int, "visual_tokens": int, "image_id": int, "pad_id": int,
        "vocab_size": int, "template": str, "tokenizer_sha256": str}  # fmt: skip
"""Keys that the manifest of packed rows must hold, with their types."""


def parse_manifest(content: bytes | str, file: str) -> dict[str, Any]:
    """Parses the manifest of packed rows. Raises UserError, which names `file`, if it is damaged or another one."""
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); pack the shards again.") from error
    is_object = isinstance(manifest, dict)
    wrong = [key for key, kind in KEYS.items() if not is_object or not isinstance(manifest.get(key), kind)]
    if wrong:
        raise UserError(f"{file}: not the manifest of packed rows, {wrong[0]} is missing; pack the shards again.")
    problem = problem_of_files(manifest["files"])
    if problem:
        raise UserError(f"{file}: {problem}; pack the shards again.")
    return manifest


def problem_of_files(files: list[Any]) -> str | None:
    """Returns the first problem of a manifest's list of files, or None."""
    for entry in files:
        if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
            return "a file of rows has no name"
        if not isinstance(entry.get("rows"), int) or entry["rows"] < 0 or "/" in entry["file"]:
            return f"the entry of {entry['file']} is damaged"
    names = [entry["file"] for entry in files]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice:
        return f"{twice} is named twice"
    return None if any(entry["rows"] for entry in files) else "it names no rows"
