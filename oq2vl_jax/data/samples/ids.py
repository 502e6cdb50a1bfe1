"""Parses ids of samples (32 hex digits, as in DataComp) and makes them from keys."""

import os
import re

import numpy as np
import xxhash

from oq2vl_jax.errors import UserError

HEX_DIGITS = "[0-9a-fA-F]{32}"


def parse_uid(text: object) -> tuple[int, int] | None:
    """Parses 32 hex digits into two 64-bit halves (high, low); None for anything else."""
    if not isinstance(text, str) or not re.fullmatch(HEX_DIGITS, text):
        return None
    return int(text[:16], 16), int(text[16:], 16)


def uid_of_key(key: str) -> str | None:
    """Makes an id from a numeric key, as img2dataset writes; None for other keys. The number is the low half, and
    `mixed` of it the high half, because sets of ids are fast if that half is random."""
    if not re.fullmatch("[0-9]{1,18}", key):
        return None
    return f"{int(mixed(np.array([int(key)], np.uint64))[0]):016x}{int(key):016x}"


def key_of_row(file: str, number: int | str = "") -> str:
    """Returns the key of a row that no column names: the folder and the name of its file, and its number there."""
    path = file if "://" in file else os.path.abspath(file)
    name = "/".join(path.rsplit("/", 2)[-2:])
    return f"{name.encode('utf-8', 'backslashreplace').decode()}#{number}"


def check_distinct(files: list[str]) -> None:
    """Raises UserError if rows of two files would have the same key."""
    seen: dict[str, str] = {}
    for file in files:
        other = seen.setdefault(key_of_row(file), file)
        if other != file:
            raise UserError(
                f"{other} and {file}: no column names their rows, and folder and name are the same, so ids would be "
                "too; take one at a time."
            )


def uid_of_text(key: str) -> str:
    """Returns the id of a key of any form: the key itself if it is one, uid_of_key's, or a 128-bit digest."""
    if re.fullmatch(HEX_DIGITS, key):
        return key.lower()
    return uid_of_key(key) or xxhash.xxh3_128_hexdigest(key.encode("utf-8", "surrogatepass"))


def mixed(x: np.ndarray) -> np.ndarray:
    """Applies splitmix64's finaliser (Steele et al. 2014): 64 bits that look random, the same on every machine."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
