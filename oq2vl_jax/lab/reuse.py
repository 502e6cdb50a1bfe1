"""Takes over finished cells of other ablations, and opens failed ones again."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from oq2vl_jax.config_files import to_json
from oq2vl_jax.errors import UserError
from oq2vl_jax.lab.cells import (
    CELL,
    OF_BASELINE,
    Cell,
    all_cells,
    results_folder,
    run_folder,
    status_of,
)
from oq2vl_jax.lab.plan import Plan
from oq2vl_jax.lab.registration import read_plan


def take_over(plan: Plan, out: str, others: tuple[str, ...]) -> None:
    """Links the finished cells of other folders that have the same configurations, seed and tasks. Raises UserError for
    a folder without a plan."""
    for other in others:
        theirs = read_plan(other)
        if theirs is None:
            raise UserError(f"--reuse {other}: no plan.json; it is no folder of an ablation.")
        if Path(other).resolve() == Path(out).resolve():
            continue
        differing = {name for name, digest in plan.data.items() if theirs.data.get(name, digest) != digest}
        if theirs.ablation.tasks != plan.ablation.tasks or differing:
            what = f"other data ({', '.join(sorted(differing))})" if differing else "other tasks"
            print(f"--reuse {other}: nothing is taken over, it has {what}", flush=True)
            continue
        found = {identity(cell): cell for cell in all_cells(theirs, other) if is_done(other, cell)}
        for cell in all_cells(plan, out):
            source = found.get(identity(cell))
            if source is not None and not run_folder(out, cell).exists():
                if plan.ablation.tasks:
                    link(results_folder(other, source), results_folder(out, cell))
                link(run_folder(other, source), run_folder(out, cell))  # last: it makes the cell done
                print(f"{cell}: taken from {other}", flush=True)


def is_done(out: str, cell: Cell) -> bool:
    return status_of(out, cell)["status"] == "done"


def identity(cell: Cell) -> str:
    """Returns all that a cell runs with, apart from its folders. A check of the baseline is no baseline: the check
    that runs it again would compare it with itself."""
    stages: dict[str, Any] = {stage: json.loads(to_json(config)) for stage, config in cell.stages.items()}
    for config in stages.values():
        config.pop("run_dir")
        config.pop("seed")
    check = cell.arm if cell.arm.startswith(OF_BASELINE) else ""
    return json.dumps([list(stages.items()), cell.seed, check], sort_keys=True)


def link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink() and not target.exists():
        raise UserError(f"{target}: leads to {os.readlink(target)}, which is gone; remove the link, or bring it back.")
    with contextlib.suppress(FileExistsError):  # another worker was faster
        target.symlink_to(source.resolve(), target_is_directory=True)


def reopen_failed(plan: Plan, out: str) -> None:
    for cell in all_cells(plan, out):
        if status_of(out, cell)["status"] == "failed":
            (run_folder(out, cell) / CELL).unlink(missing_ok=True)
