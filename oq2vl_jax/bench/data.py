"""Measures the loader: rows/s and images/s alone, and the seconds that a step of a given length waits for it.

python -m oq2vl_jax.bench data configs/pretrain.py --step-seconds 9     # on the packed folders of the config
"""

import dataclasses
import statistics
import time
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional

from oq2vl_jax.bounds import Between, Count, SmallCount, Workers, WorkersOrZero, check_bounds
from oq2vl_jax.config_files import load_config
from oq2vl_jax.errors import UserError

Seconds = Annotated[float, Between(0.0, 3600.0)]


@dataclass(frozen=True)
class Data:
    """Rows/s and images/s of the loader alone, and the seconds that a step waits for it."""

    config: Positional[str] = "configs/pretrain.py"
    sources: tuple[str, ...] = ()
    """Packed folders to read in place of the config's."""
    num_batches: Count = 8
    global_rows: SmallCount | None = None
    """Rows in a batch; None: as configured."""
    num_threads: Workers | None = None
    num_workers: WorkersOrZero | None = None
    step_seconds: Seconds | None = None
    """Length of the simulated step; None: the mean time that the loader alone takes for a batch."""
    json: bool = False


OPTIONS = Data


def measure(options: Data) -> list[dict[str, Any]]:
    """Measures the loader alone, with no pause, and under a step, with a sleep of step_seconds before each batch."""
    from oq2vl_jax.data.loading.loader import make_loader

    check_bounds(options, as_flags=True)
    config = load_config(options.config)
    changes = {"num_threads": options.num_threads, "num_workers": options.num_workers}
    changes = {name: value for name, value in changes.items() if value is not None}
    data = dataclasses.replace(config.data, sources=options.sources or config.data.sources, **changes)
    if not data.sources or data.kind == "online":
        raise UserError("bench data reads packed folders; name them with --sources.")
    rows = config.global_batch_size if options.global_rows is None else options.global_rows
    loader = make_loader(data, config.model, rows, config.seed)
    try:
        batches = iter(loader)
        next(batches)  # starts the threads
        alone, images = take(batches, options.num_batches, 0.0, config.model)
        pause = sum(alone) / len(alone) if options.step_seconds is None else options.step_seconds
        waits, _ = take(batches, options.num_batches, pause, config.model)
    finally:
        loader.close()
    return [
        {
            "way": "alone",
            "rows/s": rows * len(alone) / sum(alone),
            "images/s": images / sum(alone),
            "seconds waited a batch": statistics.median(alone),
        },
        {
            "way": f"under a step of {pause:.3g} s",
            "rows/s": rows / (pause + statistics.mean(waits)),
            "images/s": images / len(alone) / (pause + statistics.mean(waits)),
            "seconds waited a batch": statistics.median(waits),
        },
    ]


def take(batches, number: int, pause: float, model) -> tuple[list[float], int]:
    """Takes batches, each after a sleep of `pause` seconds; returns (seconds waited for each, images in all)."""
    import numpy as np

    waits, images = [], 0
    for _ in range(number):
        time.sleep(pause)
        start = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - start)
        images += int(np.count_nonzero(batch.tokens == model.image_token_id)) // model.num_visual_tokens
    return waits, images
