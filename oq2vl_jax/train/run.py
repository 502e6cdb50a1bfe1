"""One training run: assemble, then loop. The same command resumes it; on CPU the result is bit-identical."""

import contextlib
import dataclasses
import hashlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from oq2vl_jax import own_code
from oq2vl_jax.checkpoint import find_checkpoint
from oq2vl_jax.config import OptimizerConfig, TrainConfig
from oq2vl_jax.config_files import flatten, to_json, with_value
from oq2vl_jax.data.loading.batch import Batch
from oq2vl_jax.data.loading.mixture import SourceCounts
from oq2vl_jax.errors import UserError
from oq2vl_jax.lock import run_lock
from oq2vl_jax.model.adapters import is_adapter
from oq2vl_jax.paths import is_remote, join, write_text
from oq2vl_jax.remote import cache
from oq2vl_jax.runtime import any_process, is_first_process, use_compilation_cache, wait_long, whole_array
from oq2vl_jax.sharding import bytes_per_device, make_mesh, to_global_batch
from oq2vl_jax.train.attention_choice import checked_compute
from oq2vl_jax.train.checkpointer import Checkpointer
from oq2vl_jax.train.checks import (
    OWN_CODE,
    check_config,
    check_memory,
    check_run_dir,
    model_of,
    row_bytes,
)
from oq2vl_jax.train.environment import record_environment
from oq2vl_jax.train.held_out import HeldOut, write_samples
from oq2vl_jax.train.loss import Loss
from oq2vl_jax.train.metrics import StepReporter, count_batch
from oq2vl_jax.train.open_data import Loader, open_data
from oq2vl_jax.train.remote_run_dir import IDENTITY, RemoteRunDir, local_run_dir, opened
from oq2vl_jax.train.schedule import Schedule
from oq2vl_jax.train.start import start_state
from oq2vl_jax.train.step import (
    StepMetrics,
    TrainState,
    averaged_model,
    compile_train_step,
    init_train_state,
    state_shardings,
)
from oq2vl_jax.train.totals import BatchCounts, Totals
from oq2vl_jax.train.trackers import open_trackers
from oq2vl_jax.train.watchdog import Watchdog, watched
from oq2vl_jax.trees import named_arrays

SECONDS_FOR_TRANSFERS = 24 * 3600.0
"""The watchdog of the first process ends them earlier, if they do not move on."""


def run(
    config: TrainConfig,
    stop_at_step: int | None = None,
    *,
    loss: Loss | None = None,
    optimizer: Callable[[OptimizerConfig], optax.GradientTransformation] | None = None,
    schedule: Callable[[float, int, TrainConfig], Schedule] | None = None,
    projector: Any = None,
) -> str | None:
    """Trains to config.num_steps and returns parameters_sha256; None if stopped before (SIGTERM or stop_at_step).

    loss, optimizer, schedule, projector: of the researcher's own, in place of ours (docs/extend.md); the run records
    the hash of their files. Raises UserError for errors that the user can cause, including a NaN loss.
    """
    own = {"loss.own": loss, "optimizer.own": optimizer, "schedule.own": schedule, "model.projector.own": projector}
    if config.model is None:  # pyright: ignore[reportUnnecessaryComparison]
        config = dataclasses.replace(config, model=model_of(config.init_from, config.run_dir))
    config = with_own_code(config, own)
    check_config(config, len(jax.devices()))
    cache.use(config.data.cache_dir, config.data.cache_gib)
    run_dir = local_run_dir(config.run_dir, config.checkpoint.staging_dir)
    watchdog = Watchdog(run_dir, config.hang_seconds, jax.process_index(), jax.process_count())
    with (
        terminate_flag() as is_terminated,
        watched(watchdog),
        held_run_dir(config, run_dir, watchdog) as uploads,
    ):
        step, digest = train(config, run_dir, stop_at_step, is_terminated, watchdog, uploads)
    if is_first_process():
        print(last_line(config.run_dir, run_dir, step, digest))
    return digest


def with_own_code(config: TrainConfig, handed_over: dict[str, Any]) -> TrainConfig:
    """Returns the configuration with the recorded names of what was handed over, and of the files it names."""
    for key in OWN_CODE:
        thing = handed_over.get(key)
        name = own_code.hand_over(thing) if thing is not None else flatten(config)[key]
        if name is not None:
            config = with_value(config, key, own_code.record(name))
            own_code.load(flatten(config)[key])  # before jax traces
    return config


def train(
    config: TrainConfig,
    run_dir: Path,
    stop_at_step: int | None,
    is_terminated: Callable[[int], bool],
    watchdog: Watchdog,
    uploads: RemoteRunDir | None = None,
) -> tuple[int, str | None]:
    """Runs the training of `run`; saves a checkpoint and stops once is_terminated(step) is true.

    run_dir: the local one. Returns the last step, and parameters_sha256 of a finished run.
    """
    mesh = make_mesh(config.mesh)
    compute = checked_compute(config, mesh)
    use_compilation_cache(run_dir.absolute().parent)
    check_memory(config, mesh)
    data = open_data(config, run_dir)
    checkpointer = Checkpointer(run_dir, config.checkpoint.keep, uploads)
    with closed_on_failure(checkpointer, data.loader):
        check_run_dir(config, run_dir, has_checkpoint=checkpointer.latest_step() is not None)
        held_out = HeldOut(config, mesh, compute) if config.held_out.sources else None
        state, totals, base = start_state(config, mesh, checkpointer, data, run_dir)
        write_config(config, run_dir, int(state.step))
        train_step = compile_train_step(config, mesh, compute)
        start_step, saved_step = int(state.step), checkpointer.latest_step()
        last_step = min(config.num_steps, stop_at_step or config.num_steps)
        reporter = make_reporter(config, run_dir, state, totals)
    digest = None
    try:
        pending = None  # the running step: its numbers are read one step later, so that the device never waits
        for step, batch, counts in counted_batches(data.loader, range(start_step + 1, last_step + 1), config, watchdog):
            watchdog.doing("step")
            state, metrics = train_step(state, to_global_batch(batch, mesh))
            if pending:
                reporter.finish(*finite_numbers(*pending, saved_step))
            pending = (step, metrics, counts)
            reporter.skipped(data.skipped)
            due = what_is_due(step, last_step, is_terminated(step), config)
            if (due.held_out and held_out is not None) or due.save:
                reporter.finish(*finite_numbers(*pending, saved_step))  # a state with a NaN is never saved
                pending = None
            if due.held_out and held_out is not None:
                watchdog.doing("held-out loss")
                report_held_out(held_out, state, config, run_dir, reporter)
            if due.save:
                watchdog.doing("save")
                position = data.loader.get_state()
                loader_state = {"position": position, "data": data.identity, "totals": totals.state()}
                checkpointer.save(state, loader_state, config, data.tokenizer, base)
                saved_step = step
            if due.end:
                break
        if int(state.step) == config.num_steps:
            digest = parameters_sha256(state.model)
    finally:
        watchdog.doing("last save")
        checkpointer.close()
        data.loader.close()
        reporter.close(digest)
    return int(state.step), digest


def counted_batches(
    loader: Loader, steps: range, config: TrainConfig, watchdog: Watchdog
) -> Iterator[tuple[int, Batch, BatchCounts]]:
    """Yields (step, its batch, its counts and how long it was waited for)."""
    batches = iter(loader)
    for step in steps:
        start = time.monotonic()
        watchdog.doing("wait for data", step)
        batch = next(batches)
        yield step, batch, count_batch(batch, config, time.monotonic() - start)


class Due(NamedTuple):
    """What follows a step."""

    held_out: bool
    save: bool
    end: bool


def what_is_due(step: int, last_step: int, must_leave: bool, config: TrainConfig) -> Due:
    """must_leave: after SIGTERM, which may leave no time for the held-out loss; the run saves at once."""
    end = step == last_step or must_leave
    held_out = (step % config.held_out.every_num_steps == 0 or step == last_step) and not must_leave
    return Due(held_out, end or step % config.checkpoint.every_num_steps == 0, end)


def last_line(run_dir: str, local: Path, step: int, digest: str | None) -> str:
    if digest is None:
        return f"stopped at step {step}; checkpoint saved, the same command goes on from here"
    checkpoint = str(find_checkpoint(str(local)))
    if is_remote(run_dir):
        checkpoint = join(join(run_dir, "checkpoints"), Path(checkpoint).name)
    return f"done: step {step}, checkpoint {checkpoint}, parameters_sha256 {digest}"


@contextlib.contextmanager
def held_run_dir(config: TrainConfig, local: Path, watchdog: Watchdog) -> Iterator[RemoteRunDir | None]:
    """Holds the lock of a run directory; yields what uploads a remote one, in the first process. All processes wait for
    the first one before and after: it may have much to download and to upload."""
    run_dir = config.run_dir
    with contextlib.ExitStack() as stack:
        uploads, problem = None, None
        if is_first_process():
            try:
                stack.enter_context(run_lock(local))
                keep = config.checkpoint.keep
                uploads = stack.enter_context(opened(run_dir, local, keep)) if is_remote(run_dir) else None
            except UserError as error:
                problem = error
        watchdog.doing("wait for the run directory", is_limited=is_first_process())
        wait_long("run directory", SECONDS_FOR_TRANSFERS)
        if any_process(problem is not None):
            raise problem or UserError(f"run_dir {run_dir}: the first process could not open it.")
        if is_remote(run_dir) and any_process(not (local / IDENTITY).is_file()):
            raise UserError(
                f"run_dir {run_dir}: not all processes see {local}; give --checkpoint.staging-dir a folder that all "
                "nodes share, since all of them write each checkpoint."
            )
        yield uploads
        watchdog.doing("wait for the last upload", is_limited=is_first_process())
    if is_remote(run_dir):  # the first process has uploaded now
        wait_long("last upload", SECONDS_FOR_TRANSFERS)


@contextlib.contextmanager
def closed_on_failure(*opened: Any):
    """Closes what is open if the block fails: a checkpointer holds back Orbax's errors until it is closed."""
    try:
        yield
    except BaseException:
        for each in opened:
            each.close()
        raise


def make_reporter(config: TrainConfig, run_dir: Path, state: TrainState, totals: Totals) -> StepReporter:
    """The first process reports for all; each of the others logs its own metrics.jsonl, with its own waiting times."""
    log_dir, trackers, is_first, start_step = run_dir, [], is_first_process(), int(state.step)
    if is_first:
        trackers = open_trackers(config.trackers, run_dir, dataclasses.asdict(config), start_step)
    else:
        log_dir = run_dir / "processes" / str(jax.process_index())
        log_dir.mkdir(parents=True, exist_ok=True)
    num_skipped = int(state.spikes.num_skipped) if state.spikes is not None else 0
    is_mixture = config.data.kind == "packed" and len(config.data.sources) > 1
    sources = SourceCounts(config.data) if is_mixture and is_first else None
    return StepReporter(
        log_dir, start_step, config, jax.process_count(), trackers, not is_first, num_skipped, sources, totals
    )


def report_held_out(
    held_out: HeldOut, state: TrainState, config: TrainConfig, run_dir: Path, reporter: StepReporter
) -> None:
    """Reports the held-out loss. Runs before the checkpoint of the same step, so that none lacks its held-out loss."""
    start, step = time.monotonic(), int(state.step)
    numbers = held_out.losses(state.model)
    if state.ema is not None:
        numbers["held_out_loss_ema"] = held_out.loss(averaged_model(state, config))
    samples = held_out.samples(state.model) if jax.process_count() == 1 else []  # generation runs in one process only
    path = run_dir / "samples" / f"{step:06d}.html" if samples else None
    if path is not None and jax.process_index() == 0:
        write_samples(path, step, numbers["held_out_loss"], samples)
    reporter.held_out(step, numbers, samples, path, time.monotonic() - start)


def finite_numbers(step: int, metrics: StepMetrics, counts: BatchCounts, saved_step: int | None):
    """Waits for a step's numbers. Raises UserError if the loss or the gradient norm is not finite."""
    numbers = {name: value.item() for name, value in metrics._asdict().items() if value is not None}
    if not math.isfinite(numbers["loss"] + numbers["grad_norm"]):
        good = f"the last good checkpoint is step {saved_step}" if saved_step else "no checkpoint was saved yet"
        raise UserError(
            f"the loss is {numbers['loss']}, the gradient norm {numbers['grad_norm']} at step {step}; {good}. "
            "Lower optimizer.learning_rate, or look at the data."
        )
    return step, numbers, counts


def write_config(config: TrainConfig, run_dir: Path, step: int) -> None:
    if is_first_process():
        write_text(str(run_dir / "config.json"), to_json(config))
        record_environment(run_dir, step)


@contextlib.contextmanager
def terminate_flag():
    """Yields a function of the step that returns whether SIGTERM has arrived; the loop then saves and stops.

    With several processes jax's coordinator takes the signal, so that all of them stop at the same step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received = []
    previous = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        yield lambda step: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)


def parameters_sha256(model: Any) -> str:
    """Returns the SHA-256 of the names and bytes of all parameters, in the order of their names."""
    digest = hashlib.sha256()
    for name, array in sorted(named_arrays(model).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(whole_array(array)).tobytes())
    return digest.hexdigest()


def describe(config: TrainConfig) -> str:
    """Returns the text of --dry-run: the resolved configuration, parameters per part, bytes per device."""
    config = with_own_code(config, {})
    mesh = make_mesh(config.mesh)
    check_config(config, mesh.size)
    shardings = state_shardings(config, mesh)
    state = jax.eval_shape(lambda: init_train_state(jax.random.key(0), config))
    lines = [to_json(config).rstrip(), ""]
    for part in ("vision", "projector", "decoder"):
        arrays = jax.tree_util.tree_leaves_with_path(getattr(state.model, part))
        count = sum(x.size for path, x in arrays if not is_adapter(path))
        of_adapters = sum(x.size for path, x in arrays if is_adapter(path))
        status = "trained" if part in config.trained_parts else "frozen"
        if config.lora.rank is not None:
            status = f"frozen; {of_adapters:,} of adapters" if of_adapters else "frozen"
        lines.append(f"{part:10s} {count:>15,} parameters, {status}")
    sizes = {
        "parameters": bytes_per_device(state.model, shardings.model),
        "optimizer": bytes_per_device(state.opt_state, shardings.opt_state),
        **({} if state.ema is None else {"averaged weights": bytes_per_device(state.ema, shardings.ema)}),
        "batch": config.global_batch_size // mesh.size * row_bytes(config),
    }
    device = jax.devices()[0].device_kind
    lines.append(f"per device, {mesh.size} x {device}, mesh data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}:")
    lines += [f"  {name:22s} {num_bytes / 2**30:9.3f} GiB" for name, num_bytes in sizes.items()]
    lines.append("  (activations and gradients come on top)")
    return "\n".join(lines)
