"""python -m oq2vl_jax.ablate plan | run | report DEFINITION: is a change better, worse, equivalent or undecided?

    python -m oq2vl_jax.ablate plan emoji_optimizer
    python -m oq2vl_jax.ablate run emoji_optimizer --out runs/emoji_optimizer
    python -m oq2vl_jax.ablate report emoji_optimizer --out runs/emoji_optimizer

DEFINITION is a file that binds `ablation` (docs/ablations.md), or its name in configs/ablations. `run` trains every arm
with every seed and goes on where it stopped; any number of workers on any machines may share --out. `report` writes
report.md, report.html and results.csv at any time, and says what is missing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from oq2vl_jax.bounds import CountOrZero, SmallCount, Workers, check_bounds, parse
from oq2vl_jax.errors import UserError, run_command

PROG = "python -m oq2vl_jax.ablate"


@dataclass(frozen=True)
class PlanCommand:
    """Shows what an ablation will run, and what it can detect."""

    definition: tyro.conf.Positional[str]
    """File, or a name in configs/ablations."""
    out: str | None = None
    """Folder of an ablation whose measured noise and speed are used, such as an earlier one's."""


@dataclass(frozen=True)
class RunCommand:
    """Runs what is left of an ablation."""

    definition: tyro.conf.Positional[str]
    """File, or a name in configs/ablations."""
    out: str
    """Folder of the ablation; workers that share it share its cells."""
    num_workers: Workers = 1
    """Worker processes on this machine, or jobs of the executor."""
    executor: Literal["local", "ray", "slurm"] = "local"
    """ray: workers on a Ray cluster (extra ray). slurm: jobs by submitit (extra slurm)."""
    ray_address: str = "auto"
    """Address of the Ray cluster; local starts one."""
    gpus_per_worker: CountOrZero = 0
    """GPUs that Ray or Slurm gives to a worker."""
    slurm_partition: str | None = None
    slurm_minutes: SmallCount = 1440
    """Time limit of a job; the same command goes on."""
    rank: CountOrZero = 0
    """Number of this worker, where workers are started by hand: it begins at its share of the cells."""
    world_size: SmallCount = 1
    reuse: tuple[str, ...] = ()
    """Folders of other ablations, whose finished cells with the same configurations, seed and tasks are taken over."""
    retry_failed: bool = False
    """Run failed cells again."""


@dataclass(frozen=True)
class ReportCommand:
    """Writes report.md, report.html and results.csv."""

    definition: tyro.conf.Positional[str]
    """File, or a name in configs/ablations."""
    out: str
    """Folder of the ablation."""
    publish: str | None = None
    """Folder that gets NAME.md with its charts, NAME-plan.json and NAME-results.csv, such as docs/ablations."""


Command = (
    Annotated[PlanCommand, tyro.conf.subcommand("plan")]
    | Annotated[RunCommand, tyro.conf.subcommand("run")]
    | Annotated[ReportCommand, tyro.conf.subcommand("report")]
)


def plan(command: PlanCommand) -> None:
    """Prints the plan. Raises UserError."""
    from oq2vl_jax.lab.definition import load_ablation
    from oq2vl_jax.lab.forecast import as_text, measured
    from oq2vl_jax.lab.plan import make_plan

    ablation = load_ablation(command.definition)
    print(as_text(make_plan(ablation, command.definition), measured(ablation, command.out)))


def run(command: RunCommand) -> int:
    """Runs what is left of an ablation, then prints the answers. Returns 1 if a cell failed. Raises UserError."""
    from oq2vl_jax.lab.definition import load_ablation
    from oq2vl_jax.lab.executors import Crew, run_workers
    from oq2vl_jax.lab.plan import make_plan
    from oq2vl_jax.lab.registration import check_definition, registered
    from oq2vl_jax.lab.results import collect
    from oq2vl_jax.lab.reuse import reopen_failed, take_over
    from oq2vl_jax.lab.worker import prepare

    check_bounds(command, as_flags=True)
    ablation = load_ablation(command.definition)
    check_folder(command.out)
    if command.rank >= command.world_size:
        raise UserError(f"--rank = {command.rank} is not below --world-size = {command.world_size}.")
    Path(command.out).mkdir(parents=True, exist_ok=True)
    check_definition(ablation, command.out)
    make_plan(ablation, command.definition)  # finds mistakes before anything is prepared
    prepare(ablation.prepare, command.out)
    planned = make_plan(ablation, command.definition)
    check_data(planned)
    planned = registered(planned, command.out)
    take_over(planned, command.out, command.reuse)
    if command.retry_failed:
        reopen_failed(planned, command.out)
    run_workers(planned, Crew(**{name: getattr(command, name) for name in Crew._fields}))
    results = collect(planned, command.out)
    write_report(results, ReportCommand(command.definition, command.out))
    return 1 if results.failed else 0


def report(command: ReportCommand) -> None:
    """Writes the report of the cells that have ended. Raises UserError."""
    from oq2vl_jax.lab.definition import load_ablation
    from oq2vl_jax.lab.registration import check_definition, read_plan
    from oq2vl_jax.lab.results import collect

    ablation = load_ablation(command.definition)
    check_folder(command.out)
    planned = read_plan(command.out)
    if planned is None:
        raise UserError(f"--out {command.out}: no plan.json; {PROG} run writes it.")
    check_definition(ablation, command.out)
    write_report(collect(planned, command.out), command)


def write_report(results: Any, command: ReportCommand) -> None:
    from oq2vl_jax.lab.page import as_page
    from oq2vl_jax.lab.publish import publish
    from oq2vl_jax.lab.report import answers, as_markdown
    from oq2vl_jax.lab.results import as_csv
    from oq2vl_jax.paths import write_text

    out = Path(command.out)
    write_text(str(out / "results.csv"), as_csv(results))
    write_text(str(out / "report.md"), as_markdown(results, command.definition, command.out))
    write_text(str(out / "report.html"), as_page(results, command.definition, command.out))
    for line in answers(results):
        print(line.replace("**", ""))
    for cell, why in results.failed.items():
        print(f"failed: {cell}: {why}")
    if results.missing:
        print(f"missing: {len(results.missing)} cells: {', '.join(results.missing)}")
    print(f"report: {out / 'report.html'}, {out / 'report.md'}, {out / 'results.csv'}")
    if command.publish is not None:
        print(f"page: {publish(results, command.definition, command.out, command.publish)}")


def check_folder(out: str) -> None:
    from oq2vl_jax.paths import check_local, check_out

    check_out(out)
    check_local("--out", out)


def check_data(planned: Any) -> None:
    """Raises UserError, before the first run, if a task or a source of an arm is not there."""
    from oq2vl_jax.eval.benchmarks import find_benchmark
    from oq2vl_jax.eval.tables import find_files

    problems = []
    for task in planned.ablation.tasks:
        try:
            find_files(task.data, task.name, find_benchmark(task.name).files)
        except UserError as error:
            problems.append(str(error).rstrip("."))
    for name, arm in planned.arms.items():
        for stage, config in arm.stages.items():
            sources = (*config.data.sources, *config.held_out.sources) if config.data.kind == "packed" else ()
            problems += [
                f"arm {name}, {stage}: no packed data at {source}"
                for source in sources
                if not Path(source, "manifest.json").is_file()
            ]
    if problems:
        raise UserError(f"{'; '.join(dict.fromkeys(problems))}.")


def main() -> int | None:
    command = parse(Command, prog=PROG)  # pyright: ignore[reportArgumentType]
    if isinstance(command, PlanCommand):
        return plan(command)
    return run(command) if isinstance(command, RunCommand) else report(command)  # pyright: ignore


if __name__ == "__main__":
    run_command(main)
