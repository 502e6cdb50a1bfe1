"""Starts workers: in this process, as processes of this machine, on Ray, or as jobs of Slurm. The claims in the folder
divide the cells among them, so nothing else has to."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Literal, NamedTuple

from oq2vl_jax.errors import UserError
from oq2vl_jax.lab.child import end_with_parent
from oq2vl_jax.lab.plan import Plan
from oq2vl_jax.lab.registration import read_plan
from oq2vl_jax.lab.worker import StoppedError, Worker, stop_on_sigterm, work

STOPPED = 128 + signal.SIGTERM
GOES_ON = "stopped by SIGTERM; the same command goes on."


class Crew(NamedTuple):
    """How many workers start where; the options of python -m oq2vl_jax.ablate run."""

    out: str
    num_workers: int
    executor: Literal["local", "ray", "slurm"]
    ray_address: str
    gpus_per_worker: int
    slurm_partition: str | None
    slurm_minutes: int
    rank: int
    world_size: int


def run_workers(plan: Plan, crew: Crew) -> None:
    """Returns when every cell has ended. Raises UserError if the workers cannot start or were stopped."""
    if crew.executor == "ray":
        run_on_ray(crew)
    elif crew.executor == "slurm":
        run_on_slurm(crew)
    elif crew.num_workers == 1:
        try:
            work(plan, Worker(crew.out, crew.rank, crew.world_size, say))
        except StoppedError:
            raise UserError(GOES_ON) from None
    else:
        run_locally(crew)


def say(line: str) -> None:
    print(line, flush=True)


def work_alone(folder: str, out: str, rank: int, world_size: int) -> None:
    """Runs a worker in a process of its own. folder: the caller's, in which relative paths mean the same."""
    os.chdir(folder)
    if multiprocessing.parent_process() is not None:
        end_with_parent()
    plan = read_plan(out)
    assert plan is not None
    try:
        work(plan, Worker(out, rank, world_size, say))
    except StoppedError:
        raise SystemExit(STOPPED) from None
    except UserError as error:
        print(f"error: {error}", flush=True)
        raise SystemExit(2) from None


def arguments(crew: Crew, number: int) -> tuple[str, str, int, int]:
    """Returns those of the worker with a number; the workers of this machine have their share of the rank's cells."""
    return (
        os.getcwd(),
        crew.out,
        crew.rank * crew.num_workers + number,
        crew.world_size * crew.num_workers,
    )


def run_locally(crew: Crew) -> None:
    context = multiprocessing.get_context("spawn")
    numbers = range(crew.num_workers)
    workers = [context.Process(target=work_alone, args=arguments(crew, number)) for number in numbers]
    for worker in workers:
        worker.start()
    try:
        with stop_on_sigterm():
            for worker in workers:
                worker.join()
    except BaseException as error:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()
        if isinstance(error, StoppedError):
            raise UserError(GOES_ON) from None
        raise
    codes = [worker.exitcode for worker in workers]
    if all(codes):
        raise UserError(f"no worker reached the end (exit {', '.join(map(str, codes))}); the same command goes on.")


def run_on_ray(crew: Crew) -> None:
    from oq2vl_jax.jobs import connect_to_ray

    ray = connect_to_ray(crew.ray_address)
    remote = ray.remote(num_cpus=1, num_gpus=crew.gpus_per_worker)(work_alone)
    running = [remote.remote(*arguments(crew, number)) for number in range(crew.num_workers)]
    try:
        ray.get(running)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"Ray lost a worker: {reason}; the same command goes on.") from error


def run_on_slurm(crew: Crew) -> None:
    """Submits a job for each worker and waits for them. Raises UserError without submitit, and if a job fails."""
    try:
        import submitit
        from submitit.core.utils import FailedJobError, UncompletedJobError
    except ImportError as error:
        raise UserError("--executor slurm needs the extra: pip install 'oq2vl-jax[slurm]'.") from error
    try:
        executor = submitit.AutoExecutor(folder=Path(crew.out) / "slurm", cluster="slurm")
        partition = {"slurm_partition": crew.slurm_partition} if crew.slurm_partition else {}
        executor.update_parameters(
            name="ablate", timeout_min=crew.slurm_minutes, gpus_per_node=crew.gpus_per_worker, **partition
        )
        with executor.batch():
            jobs = [executor.submit(work_alone, *arguments(crew, number)) for number in range(crew.num_workers)]
        print(f"jobs {', '.join(job.job_id for job in jobs)}; their logs are in {crew.out}/slurm", flush=True)
        for job in jobs:
            job.result()
    except (RuntimeError, UncompletedJobError, FailedJobError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"--executor slurm: {reason}; the same command goes on.") from error
