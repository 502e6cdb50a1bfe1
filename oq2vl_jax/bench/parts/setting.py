"""What every part of a report is told, and the little they share: rates of the device, predictions, medians.

A part is a function of a Setting that returns figures, a dict that JSON can hold. `predictions` among them are rows of
the page's last table. A part runs in a process of its own (parts/__main__.py).
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
    """folder: of the report. config: of the measured step, is_default: not one that was asked for. is_gpu: sizes as
    published, else what a CPU does in time."""

    folder: str
    config: str
    is_default: bool
    is_gpu: bool

    def figures_of(self, name: str) -> dict[str, Any] | None:
        """What another part has found, None if it has not."""
        file = Path(self.folder) / "parts" / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def rates(self) -> Device | Rates:
        """The maker's rates of this device; of one that is not in the table the measured ones of part a."""
        import jax

        known, measured = device_of_kind(jax.devices()[0].device_kind), self.figures_of("device")
        if known is not None:
            return known
        return Rates(measured["peak_flops"], measured["memory_rate"]) if measured else Rates(1e11, 1e10)


class Skipped(Exception):  # noqa: N818 (it is no error)
    """A part that cannot run here; the message says why."""


def prediction(what: str, unit: str, predicted: float, measured: float, is_rate: bool = False) -> dict[str, Any]:
    """A row of the last table. ratio: how many times as slow, or as large, as predicted."""
    ratio = predicted / measured if is_rate else measured / predicted
    return {"what": what, "unit": unit, "predicted": predicted, "measured": measured, "ratio": ratio}


def median_seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Of run(), which waits for its result, after one call that compiles."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def largest_error(found: Any, expected: Any) -> float:
    """Largest difference over the largest value, both read as float32."""
    import jax.numpy as jnp

    found, expected = jnp.asarray(found, jnp.float32), jnp.asarray(expected, jnp.float32)
    return float(jnp.abs(found - expected).max() / jnp.maximum(jnp.abs(expected).max(), 1e-30))


def small_rows(config: TrainConfig, per_step: int) -> TrainConfig:
    """The configuration with `per_step` rows a step, or as many as it has if these are fewer, and random weights."""
    rows = min(per_step, config.global_batch_size)
    per_pass = min(config.rows_per_device or rows, rows)
    return dataclasses.replace(
        config, global_batch_size=rows - rows % per_pass, rows_per_device=per_pass, init_from=None, run_dir=""
    )


def saved_config(setting: Setting, config: TrainConfig) -> str:
    """The path of a resolved configuration, for a command that reads one."""
    file = Path(setting.folder) / "parts" / "measured_config.json"
    file.write_text(to_json(config))
    return str(file)


def as_floats(values: Sequence[Any]) -> list[float]:
    return [float(value) for value in values]
