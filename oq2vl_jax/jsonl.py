"""Files of JSON lines that are written as work goes on, and read when it is gone on with."""

import json
from pathlib import Path
from typing import Any


def read_whole_lines(file: Path) -> list[Any]:
    """What has been written so far; a last line that a kill cut off is removed from the file."""
    if not file.exists():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as stream:
            stream.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]
