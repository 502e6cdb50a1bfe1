"""What a run reports: metrics.jsonl, a progress bar on a terminal or plain lines elsewhere."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from oq2vl_jax.data.batch import Batch


class Throughput:
    """Counts real tokens and images since the last report; padding never counts."""

    def __init__(self, image_token_id: int, num_visual_tokens: int, num_processes: int):
        self._image_token_id, self._num_visual_tokens = image_token_id, num_visual_tokens
        self._num_processes = num_processes
        self._reset()

    def _reset(self) -> None:
        self._start, self._wait_seconds = time.monotonic(), 0.0
        self._tokens = self._images = self._slots = 0

    def add(self, batch: Batch, wait_seconds: float) -> None:
        self._wait_seconds += wait_seconds
        self._tokens += int(np.count_nonzero(batch.segment_ids)) * self._num_processes
        placeholders = int(np.count_nonzero(batch.tokens == self._image_token_id))
        self._images += placeholders // self._num_visual_tokens * self._num_processes
        self._slots += batch.tokens.size * self._num_processes

    def report(self) -> dict[str, float]:
        """Rates since the last report."""
        seconds = time.monotonic() - self._start
        rates = {
            "tokens_per_second": self._tokens / seconds,
            "images_per_second": self._images / seconds,
            "fill": self._tokens / max(self._slots, 1),
            "data_wait_seconds": self._wait_seconds,
        }
        self._reset()
        return rates


class MetricsLog:
    """metrics.jsonl of a run directory. On resumption, records of steps that will run again are dropped.

    `last` is the newest record kept, or {}. The closing record of a finished run is written anew.
    """

    def __init__(self, run_dir: Path, resume_step: int):
        path = run_dir / "metrics.jsonl"
        records = [json.loads(line) for line in _whole_lines(path)]
        kept = [record for record in records if record["step"] <= resume_step and "parameters_sha256" not in record]
        self.last = kept[-1] if kept else {}
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.replace(path)
        self._file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _whole_lines(path: Path) -> list[str]:
    """Lines of a jsonl file, without a last one that a kill cut off."""
    if not path.exists():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()


class Progress:
    """A bar with loss and remaining time on a terminal; a line per log interval otherwise."""

    def __init__(self, num_steps: int, start_step: int):
        self._num_steps, self._bar = num_steps, None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
                TextColumn("{task.fields[rate]:,.0f} tokens/s"), TimeRemainingColumn(),
            )  # fmt: skip
            self._task = self._bar.add_task(
                "training", total=num_steps, completed=start_step, loss=float("nan"), rate=0
            )
            self._bar.start()

    def advance(self, step: int, loss: float) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step, loss=loss)

    def log(self, record: dict[str, Any]) -> None:
        if self._bar:
            self._bar.update(self._task, rate=record["tokens_per_second"])
            return
        print(
            f"step {record['step']}/{self._num_steps}  loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  "
            f"grad_norm {record['grad_norm']:.3f}  {record['tokens_per_second']:,.0f} tokens/s  "
            f"{record['images_per_second']:,.0f} images/s  waited {record['data_wait_seconds']:.2f} s for data",
            flush=True,
        )

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
