"""Parses ids of samples (32 hex digits, as in DataComp) and makes them from keys."""

import re

import numpy as np
import xxhash

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
