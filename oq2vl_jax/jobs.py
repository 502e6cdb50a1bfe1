"""Runs jobs over shards: one task reads some input files and writes one output file and its report, on any executor.

    OUT/settings.json            settings that the written bytes depend on besides the input; others are refused
    OUT/NAME-00007.EXT           the output of task 7; it appears only when it is whole
    OUT/NAME-00007.json          its report: inputs, counts, and the identity of its inputs and settings
    OUT/manifest.json            all reports together, when every task is done

Names, order and bytes depend on the input and the settings alone, not on the executor, the number of workers, or
interruptions: a task with a valid report is not run again. There are three ways to run the tasks: processes
on this machine, `--rank R --world-size N` for Slurm arrays and any other scheduler (task i belongs to rank i mod N;
the rank that finishes last writes the manifest), and Ray.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from oq2vl_jax import paths
from oq2vl_jax.bounds import Between, Count, CountOrZero, Workers, check_bounds
from oq2vl_jax.errors import UserError

Gpus = Annotated[float, Between(0.0, 1024.0)]
RAY_TASKS_IN_FLIGHT = 4
"""Tasks per CPU of the cluster; more would only fill its queue."""
SECONDS_TO_CONNECT = 10


@dataclass(frozen=True)
class Execution:
    """Options for running the tasks; they do not affect the output."""

    num_workers: Workers = os.cpu_count() or 1
    """Processes on this machine."""
    rank: CountOrZero = 0
    """This process's number among `world_size`, for example $SLURM_ARRAY_TASK_ID."""
    world_size: Count = 1
    """Independent commands that share the tasks."""
    executor: Literal["local", "ray"] = "local"
    """local: processes on this machine. ray: the cluster at --ray-address, one CPU per task."""
    ray_address: str = "auto"
    """"auto" joins the cluster of this machine, "local" starts one."""
    gpus_per_task: Gpus = 0
    """GPUs that a task requests from Ray besides one CPU; 1 for oq2vl_jax.curate.score."""

    def __post_init__(self):
        check_bounds(self, as_flags=True)
        if self.rank >= self.world_size:
            raise UserError(f"--rank must be 0..{self.world_size - 1} for --world-size {self.world_size}.")


class Task(NamedTuple):
    index: int
    inputs: tuple[str, ...]


def nothing_beside(inputs: tuple[str, ...]) -> str:
    return ""


class Job(NamedTuple):
    """The work of each task. `work(inputs, path)` writes the local file `path` and returns a report (JSON); it must be
    picklable. `progress` is a format string over the report, for the line printed after each task."""

    out: str
    name: str
    suffix: str
    settings: dict[str, Any]
    work: Callable[[tuple[str, ...], Path], dict[str, Any]]
    progress: str
    broken_shards: Literal["stop", "keep"] = "stop"
    """stop: a report that counts a shard_cut_off, written under keep, is not valid: the task runs again."""
    version_beside: Callable[[tuple[str, ...]], str] = nothing_beside
    """Version of other files that the inputs name, such as the pictures of instruction files; "" if there are none."""

    def stem(self, index: int) -> str:
        return f"{self.name}{index:0{5 if self.name else 8}d}"


def make_tasks(files: list[str], inputs_per_task: int = 1) -> list[Task]:
    groups = [tuple(files[start : start + inputs_per_task]) for start in range(0, len(files), inputs_per_task)]
    return [Task(index, group) for index, group in enumerate(groups)]


def run_job(job: Job, tasks: list[Task], execution: Execution) -> list[dict[str, Any]] | None:
    """Runs this rank's tasks; returns the reports of all tasks in order, or None while tasks of other ranks remain."""
    paths.check_out(job.out)
    paths.make_folder(job.out)
    check_out_is_ours(job, tasks)
    check_inputs_are_no_outputs(job, tasks)
    paths.remove(paths.join(job.out, "manifest.json"))  # a manifest means that every task is done
    paths.write_text(paths.join(job.out, "settings.json"), json.dumps(job.settings, indent=2) + "\n")
    mine = tasks[execution.rank :: execution.world_size]
    done = list(show_progress(job, execute(partial(run_task, job), mine, execution), len(mine)))
    if execution.world_size == 1:
        return done
    return collect_reports(job, tasks)


def check_out_is_ours(job: Job, tasks: list[Task]) -> None:
    """Raises UserError for a folder of another command, or one written with other settings or more input."""
    names = paths.list_names(job.out)
    if "settings.json" not in names:
        ours = {"manifest.json", *(f"{job.stem(task.index)}.json" for task in tasks)}
        foreign = sorted(name for name in names if name in ours or name.endswith(job.suffix))
        if foreign:
            raise UserError(
                f"--out {job.out} holds {foreign[0]}, which this command did not write; choose another folder."
            )
        return
    mine = {f"{job.stem(task.index)}{job.suffix}" for task in tasks}
    older = sorted(name for name in names if name.endswith(job.suffix) and name not in mine)
    if older:
        raise UserError(
            f"--out {job.out} holds {older[0]}, made from more input than this time; choose another folder."
        )
    saved = read_settings(job.out)
    changed = [
        f"{key}: {saved.get(key)} there, {value} now" for key, value in job.settings.items() if saved.get(key) != value
    ]
    if changed:
        raise UserError(
            f"--out {job.out} was written with other settings ({'; '.join(changed)}); choose another folder."
        )


def check_inputs_are_no_outputs(job: Job, tasks: list[Task]) -> None:
    outputs = {os.path.abspath(paths.join(job.out, f"{job.stem(task.index)}{job.suffix}")) for task in tasks}
    both = [path for task in tasks for path in task.inputs if os.path.abspath(path) in outputs]
    if both:
        raise UserError(f"--out {job.out}: {both[0]} is an input and would be overwritten; choose another folder.")


def read_settings(out: str) -> dict[str, Any]:
    """Reads OUT/settings.json. Raises UserError if it is missing or damaged."""
    settings = paths.read_json(paths.join(out, "settings.json"))
    if not isinstance(settings, dict):
        raise UserError(f"{paths.join(out, 'settings.json')}: expected a JSON object; choose another --out folder.")
    return settings


def write_manifest(job: Job, manifest: dict[str, Any]) -> None:
    """Writes the manifest, the last file of a job, and removes the partial files of killed workers."""
    for name in paths.list_names(job.out):
        if name.endswith(paths.PARTIAL) and job.suffix in name:  # not a manifest that another rank is writing
            paths.remove(paths.join(job.out, name))
    paths.write_text(paths.join(job.out, "manifest.json"), json.dumps(manifest, indent=2) + "\n")


def run_task(job: Job, task: Task) -> dict[str, Any]:
    """Runs a task, or returns the report of an earlier run that finished it."""
    finished = finished_report(job, task)
    if finished is not None:
        return finished
    file, identity = f"{job.stem(task.index)}{job.suffix}", task_identity(job, task)
    output = paths.join(job.out, file)
    with paths.whole_output(output) as partial_file:
        report = {"file": file, "inputs": list(task.inputs), **job.work(task.inputs, partial_file)}
    stored = json.dumps(report | {"identity": identity, "size_bytes": paths.file_version(output)[0]})
    paths.write_text(paths.join(job.out, f"{job.stem(task.index)}.json"), stored)
    return json.loads(json.dumps(report))


def finished_report(job: Job, task: Task) -> dict[str, Any] | None:
    file = paths.join(job.out, f"{job.stem(task.index)}.json")
    if not paths.exists(file):
        return None
    try:
        report = paths.read_json(file)
        identity, size = report.pop("identity"), report.pop("size_bytes")
        is_its_own = report["file"] == f"{job.stem(task.index)}{job.suffix}" and report["inputs"] == list(task.inputs)
        is_cut_off = "shard_cut_off" in report["skipped"] and job.broken_shards == "stop"
    except (UserError, KeyError, TypeError, AttributeError):  # damaged: the task is done again
        return None
    output = paths.join(job.out, f"{job.stem(task.index)}{job.suffix}")
    is_whole = paths.exists(output) and paths.file_version(output)[0] == size
    return report if is_its_own and is_whole and not is_cut_off and identity == task_identity(job, task) else None


def task_identity(job: Job, task: Task) -> str:
    """Returns a digest that changes whenever a finished task must be run again."""
    inputs = [
        [
            os.path.abspath(path) if not paths.is_remote(path) else path,
            *paths.file_version(paths.split_range(path)[0]),
        ]
        for path in task.inputs
    ]
    beside = job.version_beside(task.inputs)
    values = [job.settings, inputs, *([beside] if beside else [])]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def collect_reports(job: Job, tasks: list[Task]) -> list[dict[str, Any]] | None:
    """Returns the reports of every rank, or None if some are missing."""
    names = paths.list_names(job.out)
    missing = sum(f"{job.stem(task.index)}.json" not in names for task in tasks)
    if not missing:
        reports = [finished_report(job, task) for task in tasks]
        missing = reports.count(None)
        if not missing:
            return [report for report in reports if report is not None]
    print(f"{len(tasks) - missing} of {len(tasks)} tasks are done; the rank that finishes last writes the manifest.")
    return None


def execute(function: Callable[[Task], dict], tasks: list[Task], execution: Execution) -> Iterator[dict]:
    """Returns the results in the order of the tasks."""
    num_workers = min(execution.num_workers, len(tasks))
    if execution.executor == "ray":
        return execute_on_ray(function, tasks, execution)
    return map(function, tasks) if num_workers <= 1 else execute_locally(function, tasks, num_workers)


def execute_locally(function: Callable[[Task], dict], tasks: list[Task], num_workers: int) -> Iterator[dict]:
    """Runs the tasks in spawned processes, because the parent may hold threads."""
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(function, tasks)
        except BrokenProcessPool as error:
            raise UserError("a worker was killed, perhaps for want of memory; try fewer --num-workers.") from error
        finally:
            pool.shutdown(cancel_futures=True)


def execute_on_ray(function: Callable[[Task], dict], tasks: list[Task], execution: Execution) -> Iterator[dict]:
    """Runs the tasks on Ray. Workers change to this process's folder, so that relative paths mean the same."""
    ray = connect_to_ray(execution.ray_address)
    from ray.exceptions import RayError, RayTaskError

    remote = ray.remote(num_cpus=1, num_gpus=execution.gpus_per_task)(call_in_folder)
    window = RAY_TASKS_IN_FLIGHT * max(1, int(ray.cluster_resources().get("CPU", 1)))
    running = [remote.remote(os.getcwd(), function, task) for task in tasks[:window]]
    for i in range(len(tasks)):
        try:
            result = ray.get(running[i])
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from error
        except RayError as error:  # a worker or node that died
            raise UserError(
                f"Ray lost a task: {str(error).strip().splitlines()[0]}; the same command goes on."
            ) from error
        if i + window < len(tasks):
            running.append(remote.remote(os.getcwd(), function, tasks[i + window]))
        yield result


def connect_to_ray(address: str) -> Any:
    """Returns the package ray, connected to a cluster. Raises UserError."""
    try:
        import ray
    except ImportError as error:
        raise UserError("--executor ray needs the extra: pip install 'oq2vl-jax[ray]'.") from error
    if not ray.is_initialized():
        try:
            check_is_listening(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except OSError as error:  # includes ConnectionError
            raise UserError(
                f"--ray-address {address}: no Ray cluster is running there; start one, or pass local."
            ) from error
    return ray


def check_is_listening(address: str) -> None:
    """Raises OSError if nobody listens at the address; Ray itself would wait for minutes. auto and local pass."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=SECONDS_TO_CONNECT).close()


def call_in_folder(folder: str, function: Callable[[Task], dict], task: Task) -> dict:
    os.chdir(folder)
    return function(task)


def show_progress(job: Job, reports: Iterable[dict], total: int) -> Iterator[dict]:
    """Shows a progress bar on a terminal, otherwise a plain line per task (stderr)."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(reports, description=Path(job.out).name, total=total, console=Console(stderr=True))
        return
    for i, report in enumerate(reports):
        print(f"{i + 1}/{total}: {report['inputs'][0]}: {job.progress.format(**report)}", file=sys.stderr)
        yield report


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"
