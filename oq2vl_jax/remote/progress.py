"""When a transfer last moved on, so that a long one does not look like a hang (train/watchdog.py)."""

import time

_LAST = [0.0]


def moved() -> None:
    _LAST[0] = time.monotonic()


def last_moved() -> float:
    """Returns a time of time.monotonic(); 0 before the first transfer."""
    return _LAST[0]
