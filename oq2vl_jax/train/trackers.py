"""Sends metrics to TensorBoard, Weights & Biases or Trackio, beside metrics.jsonl. Each is an extra, imported on use.

A resumed run continues the tracker's run, which is identified by the run directory, as the configuration names it.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from oq2vl_jax.errors import UserError
from oq2vl_jax.paths import is_remote

PROJECT = "oq2vl_jax"


class Sampled(NamedTuple):
    """One generated answer to a held-out question."""

    prompt: str
    reply: str
    reference: str
    images: list[bytes]


class RunTracker(Protocol):
    def log(self, step: int, numbers: dict[str, float]) -> None: ...

    def log_samples(self, step: int, samples: list[Sampled], page: Path | None) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN_DIR/tensorboard."""

    def __init__(self, run_dir: Path, config: dict[str, Any], start_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else None)
        labels = [config["tracker_group"], *config["tracker_tags"]]
        if any(labels):  # it knows neither groups nor tags
            self._writer.add_text("labels", ", ".join(filter(None, labels)), start_step)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def log_samples(self, step: int, samples: list[Sampled], page: Path | None) -> None:
        if samples:
            self._writer.add_text("samples", as_markdown(samples), step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    def __init__(self, run_dir: Path, config: dict[str, Any], start_step: int):
        import wandb  # pyright: ignore[reportMissingImports]

        self._wandb = wandb
        self._run = wandb.init(
            project=PROJECT,
            name=run_dir.name,
            id=run_identity(config["run_dir"]),
            resume="allow",
            dir=str(run_dir),
            config=config,
            group=config["tracker_group"],
            tags=list(config["tracker_tags"]),
        )

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def log_samples(self, step: int, samples: list[Sampled], page: Path | None) -> None:
        if page is not None:
            self._run.log({"samples": self._wandb.Html(page.read_text())}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    def __init__(self, run_dir: Path, config: dict[str, Any], start_step: int):
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio = trackio
        trackio.init(
            project=PROJECT,
            name="-".join([*(config["tracker_tags"] or (run_dir.name,)), run_identity(config["run_dir"])]),
            group=config["tracker_group"],  # it knows no tags: they are in the name
            resume="allow",
            config=config,
        )

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._trackio.log(numbers, step=step)

    def log_samples(self, step: int, samples: list[Sampled], page: Path | None) -> None:
        if samples:
            self._trackio.log({"samples": self._trackio.Markdown(as_markdown(samples))}, step=step)

    def close(self) -> None:
        self._trackio.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}


def open_trackers(names: tuple[str, ...], run_dir: Path, config: dict[str, Any], start_step: int) -> list[RunTracker]:
    """Opens trackers by name. Raises UserError if the package of one is missing."""
    trackers: list[RunTracker] = []
    for name in names:
        try:
            trackers.append(TRACKERS[name](run_dir, config, start_step))
        except ImportError as error:
            raise UserError(
                f"trackers {name}: package {error.name} is missing; pip install 'oq2vl-jax[{name}]'."
            ) from error
    return trackers


def run_identity(run_dir: str) -> str:
    place = run_dir if is_remote(run_dir) else str(Path(run_dir).absolute())
    return hashlib.sha256(place.encode()).hexdigest()[:12]


def as_markdown(samples: list[Sampled]) -> str:
    return "\n\n".join(f"**{s.prompt}**\n\nanswer: {s.reply}\n\nreference: {s.reference}" for s in samples)
