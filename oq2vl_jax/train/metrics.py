"""Reports the metrics of a run: metrics.jsonl, and a progress bar on a terminal or plain lines elsewhere."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from oq2vl_jax.config import TrainConfig
from oq2vl_jax.data.loading.batch import IGNORE, Batch
from oq2vl_jax.data.loading.mixture import SourceCounts
from oq2vl_jax.devices import Device, device_of_kind
from oq2vl_jax.errors import UserError
from oq2vl_jax.paths import write_text
from oq2vl_jax.train.flops import Work, model_flops
from oq2vl_jax.train.totals import BatchCounts, Totals
from oq2vl_jax.train.trackers import RunTracker, Sampled


def count_batch(batch: Batch, config: TrainConfig, wait_seconds: float) -> BatchCounts:
    work = work_of(batch, config)
    flops = model_flops(config, work).total
    return BatchCounts(int(work.tokens), int(work.labelled), int(work.images), batch.tokens.size, wait_seconds, flops)


def work_of(batch: Batch, config: TrainConfig) -> Work:
    """Counts the contents of a batch of numpy arrays, without padding."""
    is_real = batch.segment_ids > 0
    placeholders = np.count_nonzero(batch.tokens == config.model.image_token_id)
    return Work(
        tokens=int(np.count_nonzero(is_real)),
        images=int(placeholders) // config.model.num_visual_tokens,
        pairs=int((batch.positions[is_real].astype(np.int64) + 1).sum()),
        labelled=int(np.count_nonzero(batch.labels != IGNORE)),
    )


def mean_step(config: TrainConfig, num_steps: int = 16) -> tuple[float, float]:
    """Returns the mean real tokens and model FLOPs of the first steps of a run over packed data."""
    from oq2vl_jax.data.loading.loader import make_loader

    seed = config.data.seed_of(config.seed)
    loader = make_loader(config.data, config.model, config.global_batch_size, seed, 0, 1)
    try:
        counts = [count_batch(batch, config, 0.0) for batch, _ in zip(loader, range(num_steps), strict=False)]
    finally:
        loader.close()
    return sum(one.tokens for one in counts) / num_steps, sum(one.model_flops for one in counts) / num_steps


class Throughput:
    """Rates over the batches added since the last report, for all processes together.

    device: has the peak FLOP/s, from which MFU follows; None leaves MFU out.
    """

    def __init__(self, num_processes: int, num_local_devices: int = 1, device: Device | None = None):
        self._num_processes, self._num_local_devices, self._device = num_processes, num_local_devices, device
        self._reset()

    def _reset(self) -> None:
        self._start, self._counts = time.monotonic(), []

    def pause(self, seconds: float) -> None:
        """Leaves out `seconds` that were spent on something else."""
        self._start += seconds

    def add(self, counts: BatchCounts) -> None:
        self._counts.append(counts)

    def report(self) -> dict[str, float]:
        seconds = time.monotonic() - self._start
        total = BatchCounts(*(sum(values) for values in zip(*self._counts, strict=True)))
        self._reset()
        per_device = total.model_flops / seconds / self._num_local_devices
        utilisation = {"mfu": per_device / self._device.peak_flops} if self._device else {}
        return utilisation | {
            "model_tflops_per_device": per_device / 1e12,
            "tokens_per_second": total.tokens * self._num_processes / seconds,
            "images_per_second": total.images * self._num_processes / seconds,
            "fill": total.tokens / total.slots,
            "data_wait_seconds": total.wait_seconds,
        }


class MetricsLog:
    """The metrics.jsonl of a run directory. Resuming drops the records of steps that will run again.

    `last` is the newest kept record of a training step, or {}. The closing record of a finished run is dropped too,
    and written again at the end.
    """

    def __init__(self, run_dir: Path, resume_step: int, log_every: int):
        """Raises UserError for a line that is not the record of a step."""
        path = run_dir / "metrics.jsonl"
        records = [_record(line, f"{path}, line {i}") for i, line in enumerate(_whole_lines(path), 1)]
        kept = [record for record in records if record["step"] <= resume_step and "parameters_sha256" not in record]
        self.last = next((record for record in reversed(kept) if "loss" in record), {})
        if resume_step - self.last.get("step", 0) >= log_every:
            print(f"{path}: the records of steps {self.last.get('step', 0) + 1} to {resume_step} are not there; the "
                  "run goes on without them.", file=sys.stderr)  # fmt: skip
        write_text(str(path), "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: no JSON; move the file away to go on without its records.") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise UserError(f"{where}: no record of a step; move the file away to go on without its records.")
    return record


def _whole_lines(path: Path) -> list[str]:
    """Returns the lines of a jsonl file, without a last line that a kill cut off."""
    if not path.exists():
        return []
    text = path.read_text(errors="replace")
    return text[: text.rfind("\n") + 1].splitlines()


class Progress:
    """A bar with loss and remaining time on a terminal; a line per log interval otherwise."""

    def __init__(self, num_steps: int, start_step: int, is_quiet: bool = False):
        self._num_steps, self._bar, self._is_quiet = num_steps, None, is_quiet
        if sys.stdout.isatty() and not is_quiet:
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
        if self._is_quiet:
            return
        mfu = f"  MFU {100 * record['mfu']:.1f} %" if "mfu" in record else ""
        print(
            f"step {record['step']}/{self._num_steps}  loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  "
            f"grad_norm {record['grad_norm']:.3f}  {record['tokens_per_second']:,.0f} tokens/s  "
            f"{record['images_per_second']:,.0f} images/s  waited {record['data_wait_seconds']:.2f} s for data{mfu}",
            flush=True,
        )

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


class StepReporter:
    """Writes the numbers of each finished step to metrics.jsonl, the trackers and the screen."""

    def __init__(
        self,
        run_dir: Path,
        start_step: int,
        config: TrainConfig,
        num_processes: int,
        trackers: list[RunTracker] | None = None,
        is_quiet: bool = False,
        num_skipped: int = 0,
        sources: SourceCounts | None = None,
        totals: Totals | None = None,
    ):
        """num_skipped: steps of the run that were spikes (config.skip_spikes), before start_step. sources: counts rows
        and epochs of each source of a mixture. totals: of the run up to start_step; None: it begins."""
        self._log = MetricsLog(run_dir, start_step, config.log_every)
        self._progress = Progress(config.num_steps, start_step, is_quiet)
        self._trackers, self._is_quiet = trackers or [], is_quiet
        local = jax.local_devices()
        device = device_of_kind(local[0].device_kind)
        if device is None and local[0].platform != "cpu" and not is_quiet:
            print(f"no MFU: {local[0].device_kind} is not in the table of oq2vl_jax/devices.py", file=sys.stderr)
        self._throughput = Throughput(num_processes, len(local), device)
        self._num_steps, self._log_every = config.num_steps, config.log_every
        self._record, self._num_skipped = self._log.last, num_skipped
        self._skipped: dict[str, Any] = {}
        self._sources, self._rows_per_step = sources, config.global_batch_size
        self._totals = totals or Totals(num_processes, {})

    def finish(self, step: int, numbers: dict[str, float], counts: BatchCounts) -> None:
        """numbers: of the step, as in StepMetrics."""
        num_skipped = int(numbers.get("skipped_steps", self._num_skipped))
        if num_skipped > self._num_skipped and not self._is_quiet:
            print(
                f"step {step}: not applied, a spike (loss {numbers['loss']:.4f}, grad_norm {numbers['grad_norm']:.3f})",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        self._num_skipped = num_skipped
        self._throughput.add(counts)
        self._totals.add(counts)
        self._progress.advance(step, numbers["loss"])
        self._record = {"step": step, **numbers}
        if step % self._log_every == 0 or step == self._num_steps:
            self._record |= self._throughput.report() | self._totals.record()
            if self._sources is not None:
                self._record |= self._sources.up_to(step * self._rows_per_step)
            self._write(self._record)
            self._progress.log(self._record)

    def held_out(
        self, step: int, numbers: dict[str, float], samples: list[Sampled], page: Path | None, seconds: float
    ) -> None:
        """Reports the held-out loss and the samples of a step; `seconds` do not count as training time."""
        self._throughput.pause(seconds)
        self._totals.pause(seconds)
        self._write({"step": step, **numbers})
        for tracker in self._trackers:
            tracker.log_samples(step, samples, page)
        if self._is_quiet:
            return
        shown = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items())
        print(f"step {step}/{self._num_steps}  {shown}" + (f"  samples {page}" if page else ""), flush=True)

    def skipped(self, counts: Mapping[str, int]) -> None:
        """Adds to later records how many samples online packing has skipped in this process, by reason."""
        self._skipped = {"skipped_samples": dict(counts)} if counts else {}

    def _write(self, record: dict[str, Any]) -> None:
        self._log.write(record | self._skipped)
        for tracker in self._trackers:
            tracker.log(record["step"], {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"})

    def close(self, parameters_sha256: str | None = None) -> None:
        """Closes the bar, the log and the trackers; the digest of a finished run becomes its last record."""
        self._progress.close()
        if self._sources is not None and not self._is_quiet and "step" in self._record:
            counts = self._sources.up_to(self._record["step"] * self._rows_per_step)
            parts = (f"{name} {counts[f'rows/{name}']:,.0f} ({counts[f'epochs/{name}']:.2f} epochs)"
                     for name in self._sources.names)  # fmt: skip
            print(f"rows by source: {', '.join(parts)}", flush=True)
        if parameters_sha256:
            self._log.write(
                {**self._record, **self._skipped, "step": self._num_steps, "parameters_sha256": parameters_sha256}
            )
        self._log.close()
        for tracker in self._trackers:
            tracker.close()
