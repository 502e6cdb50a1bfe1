"""The arguments of every part of a report, and their shared functions: rates of the device, predictions, medians.

A part is a function of a Setting that returns figures, a dict that JSON can hold. Its key `predictions` holds rows of
the page's table "Predicted and measured". A part runs in its own process (parts/__main__.py).
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from oq2vl_jax.config import TrainConfig
from oq2vl_jax.config_files import to_json
from oq2vl_jax.devices import Device, Rates, device_of_kind

GIB = 2**30


class Setting(NamedTuple):
    """folder: of the report. config: of the measured step. is_default: no --config was given. is_gpu: published sizes;
    otherwise sizes that a CPU can run in time."""

    folder: str
    config: str
    is_default: bool
    is_gpu: bool

    def figures_of(self, name: str) -> dict[str, Any] | None:
        """Returns the figures of another part, None if it has not run."""
        file = Path(self.folder) / "parts" / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def rates(self) -> Device | Rates:
        """Returns the maker's rates of this device. If it is not in the table: the rates that part a measured, or
        1e11 FLOP/s and 1e10 bytes/s if part a has not run."""
        import jax

        known, measured = device_of_kind(jax.devices()[0].device_kind), self.figures_of("device")
        if known is not None:
            return known
        return Rates(measured["peak_flops"], measured["memory_rate"]) if measured else Rates(1e11, 1e10)


class Skipped(Exception):  # noqa: N818 (it is no error)
    """A part that cannot run here; the message says why."""


def prediction(label: str, unit: str, predicted: float, measured: float, is_rate: bool = False) -> dict[str, Any]:
    """Returns a row of "Predicted and measured". ratio: how many times as slow, or as large, as predicted."""
    ratio = predicted / measured if is_rate else measured / predicted
    return {"what": label, "unit": unit, "predicted": predicted, "measured": measured, "ratio": ratio}


def median_seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Returns the median seconds of run(), after one call that compiles. run() must wait for its result."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def largest_error(actual: Any, expected: Any) -> float:
    """Returns the largest difference divided by the largest expected value, both read as float32."""
    import jax.numpy as jnp

    actual, expected = jnp.asarray(actual, jnp.float32), jnp.asarray(expected, jnp.float32)
    return float(jnp.abs(actual - expected).max() / jnp.maximum(jnp.abs(expected).max(), 1e-30))


def small_rows(config: TrainConfig, per_step: int) -> TrainConfig:
    """Returns the configuration with at most `per_step` rows, a multiple of rows_per_device, and random weights."""
    rows = min(per_step, config.global_batch_size)
    per_pass = min(config.rows_per_device or rows, rows)
    return dataclasses.replace(
        config, global_batch_size=rows - rows % per_pass, rows_per_device=per_pass, init_from=None, run_dir=""
    )


def saved_config(setting: Setting, config: TrainConfig) -> str:
    """Writes a resolved configuration for a command that reads one; returns its path."""
    file = Path(setting.folder) / "parts" / "measured_config.json"
    file.write_text(to_json(config))
    return str(file)


def as_floats(values: Sequence[Any]) -> list[float]:
    return [float(value) for value in values]
