"""Reads files of JSON lines that grow during a job, so that an interrupted job can resume."""

import json
from pathlib import Path
from typing import Any


def read_whole_lines(file: Path) -> list[Any]:
    """Returns the lines written so far. If a kill cut off the last line, it is removed from the file."""
    if not file.exists():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as stream:
            stream.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]
