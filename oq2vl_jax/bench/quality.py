"""Measures time to quality: steps and seconds of training until the held-out loss is at or below a target.

    python -m oq2vl_jax.bench quality configs/easy_vqa.py --target 0.15 --changes data.sources='["TRAIN"]' \\
        --held-out HELD_OUT --against optimizer.kind=adamw num_steps=900

A faster step and a better recipe count alike. Each seed trains in a process of its own, the configuration and, with
--against, the other recipe in turns, and ends at the target. Seconds are training_seconds of the metrics: with the
compilation of the step, without held-out evaluations. A run that ends above the target counts as never.
"""

import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from tyro.conf import Positional

from oq2vl_jax.bench.report_runner import last_line
from oq2vl_jax.bounds import Between, Count, Seed, SmallCount, check_bounds
from oq2vl_jax.config import TrainConfig
from oq2vl_jax.config_files import load_config, to_json, with_changes
from oq2vl_jax.errors import UserError

POLL_SECONDS = 0.5
NEVER = math.inf


@dataclass(frozen=True)
class Quality:
    """Steps and seconds until the held-out loss reaches a target; median and range over seeds."""

    config: Positional[str]
    target: Annotated[float, Between(0.0, 100.0, is_above=True)]
    """Held-out loss in nats per labelled token."""
    held_out: str | None = None
    """Folder of held-out packed rows; None: as configured."""
    changes: tuple[str, ...] = ()
    """Values to replace in the configuration, for both recipes."""
    against: tuple[str, ...] = ()
    """Values of another recipe, measured in turns."""
    num_seeds: SmallCount = 5
    first_seed: Seed = 1
    every: Count = 20
    """Steps between two held-out evaluations."""
    num_batches: Count = 8
    """Global batches of an evaluation."""
    json: bool = False


OPTIONS = Quality


class Reached(NamedTuple):
    """Where a run first was at or below the target, both NEVER if it was not; and its lowest held-out loss."""

    steps: float
    seconds: float
    lowest: float


def measure(options: Quality) -> list[dict[str, Any]]:
    """Returns a row for each recipe."""
    check_bounds(options, as_flags=True)
    config = with_changes(load_config(options.config), options.changes, "--changes")
    sources = (options.held_out,) if options.held_out else config.held_out.sources
    if not sources:
        raise UserError("--held-out: a folder of held-out rows is needed; the configuration names none.")
    held_out = dataclasses.replace(
        config.held_out, sources=sources, every_num_steps=options.every, num_batches=options.num_batches, num_samples=0
    )
    config = dataclasses.replace(config, held_out=held_out, log_every=options.every)
    recipes = {"as configured": config}
    if options.against:
        recipes[" ".join(options.against)] = with_changes(config, options.against, "--against")
    found: dict[str, list[Reached]] = {name: [] for name in recipes}
    for seed in range(options.first_seed, options.first_seed + options.num_seeds):
        for name, recipe in recipes.items():
            found[name].append(trained(dataclasses.replace(recipe, seed=seed), options.target))
            print(f"seed {seed}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    return [summary(name, reached, options.target) for name, reached in found.items()]


def summary(name: str, reached: list[Reached], target: float) -> dict[str, Any]:
    """Returns medians and ranges over the seeds; a median is None if half of the runs never reached the target."""

    def finite(value: float) -> float | None:
        return None if value == NEVER else value

    row: dict[str, Any] = {
        "recipe": name, "target": target, "reached": sum(run.steps < NEVER for run in reached), "seeds": len(reached),
    }  # fmt: skip
    for label in ("steps", "seconds"):
        values = sorted(getattr(run, label) for run in reached)
        row |= {label: finite(statistics.median_high(values)), f"least {label}": finite(values[0]),
                f"most {label}": finite(values[-1])}  # fmt: skip
    return row | {"lowest loss": statistics.median(run.lowest for run in reached)}


def trained(config: TrainConfig, target: float) -> Reached:
    """Trains until the target or the end, in a folder that is removed. Raises UserError with the last words of a run
    that failed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(to_json(dataclasses.replace(config, run_dir=str(folder / "run"))))
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "oq2vl_jax.train", str(folder / "config.json")], stdout=log, stderr=log
            )
            try:
                reached = None
                while reached is None or reached.steps == NEVER:
                    code = process.poll()  # before reading, so that the last records of a run that ended are read
                    reached = where_reached(folder / "run" / "metrics.jsonl", target)
                    if code is not None:
                        break
                    time.sleep(POLL_SECONDS)
            finally:
                process.kill()
                process.wait()
        if code and reached.steps == NEVER:
            raise UserError(f"the training ended with exit code {code}: {last_line(folder / 'log')}")
    return reached


def where_reached(metrics: Path, target: float) -> Reached:
    """Reads a metrics.jsonl that may still grow. The seconds of an evaluation are those of its step's record."""
    seconds, lowest = NEVER, NEVER
    for line in metrics.read_text().splitlines() if metrics.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # being written
            break
        seconds = record.get("training_seconds", seconds)
        loss = record.get("held_out_loss", NEVER)
        lowest = min(lowest, loss)
        if loss <= target:
            return Reached(record["step"], seconds, lowest)
    return Reached(NEVER, NEVER, lowest)
