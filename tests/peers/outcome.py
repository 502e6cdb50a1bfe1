"""What a peer's process says when it ends without figures, and when its version is not one that was tried."""

import re
import sys
from collections.abc import Mapping

TRIED = {"torch": "2.13.0", "transformers": "5.24.0", "maxtext": "0.2.5", "easydel": "0.3.0"}
"""Versions of the packages whose steps are measured that the comparison was tried with."""
NO_MEMORY = (
    "out of memory", "can't allocate memory", "not enough memory", "RESOURCE_EXHAUSTED", "bad_alloc", "MemoryError",
    "Unable to allocate",
)  # fmt: skip
"""How PyTorch, XLA, C++, Python and numpy say that memory is short."""
KILLED = (-9, 137)
"""Exit codes of a process that the system killed, itself or inside a shell."""


def why_it_ended(exit_code: int, words: str) -> str:
    """Returns a sentence. words: what the process wrote to standard error; shown where they are not understood."""
    if exit_code in KILLED:
        return "was killed by the system, which happens where memory is short; the others are compared"
    if missing := re.search(r"ModuleNotFoundError: No module named '([^']+)'", words):
        return f"is left out: the package {missing[1]} is not installed; the others are compared"
    if said := next((name for name in NO_MEMORY if name in words), None):
        return f'needs more memory than there is ("{said}"); the others are compared'
    print(words, file=sys.stderr)
    return f"ended without figures, exit code {exit_code}; its own words stand above"


def untried(versions: Mapping[str, str]) -> list[str]:
    """A sentence for every package whose version is not the one of TRIED; torch's +cpu does not count."""
    return [
        f"{package} {version} is not the version that this was tried with ({TRIED[package]})"
        for package, version in versions.items()
        if package in TRIED and version.split("+")[0] != TRIED[package]
    ]
