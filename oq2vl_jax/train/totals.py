"""Counts what a run has spent since its first step; checkpoints hold the counts, so that a resumed run goes on."""

import time
from typing import Any, NamedTuple


class BatchCounts(NamedTuple):
    """Contents of a batch without padding, its token slots, and the seconds that the loop waited for it."""

    tokens: int
    labelled_tokens: int
    images: int
    slots: int
    wait_seconds: float
    model_flops: float


COUNTED = ("tokens", "labelled_tokens", "images", "model_flops")


class Totals:
    """Real tokens, labelled tokens, images and model FLOPs of all processes, and seconds of training.

    saved: `state` of the checkpoint that the run goes on from; {} for a new run; None for a checkpoint of an earlier
    version, which has none: then nothing is reported, rather than a part.
    """

    def __init__(self, num_processes: int, saved: dict[str, float] | None):
        self._num_processes, self._is_known = num_processes, saved is not None
        self._counts = {name: (saved or {}).get(name, 0) for name in COUNTED}
        self._start = time.monotonic() - (saved or {}).get("seconds", 0.0)

    def pause(self, seconds: float) -> None:
        """Leaves out `seconds` that were spent on something else."""
        self._start += seconds

    def add(self, counts: BatchCounts) -> None:
        for name in COUNTED:
            self._counts[name] += getattr(counts, name) * self._num_processes

    def state(self) -> dict[str, float] | None:
        return {**self._counts, "seconds": time.monotonic() - self._start} if self._is_known else None

    def record(self) -> dict[str, Any]:
        """Returns the totals for metrics.jsonl: total_tokens .., training_seconds."""
        if not self._is_known:
            return {}
        totals = {f"total_{name}": value for name, value in self._counts.items()}
        return totals | {"training_seconds": time.monotonic() - self._start}
