"""The cells of an ablation: an arm with one seed. A cell runs once, and its folders tell how far it is.

DIR/runs/ARM-HASH/seed-N/STAGE           ordinary run directories, and STAGE.log beside them
DIR/runs/ARM-HASH/seed-N/cell.json       written last: {"status": "done"} or {"status": "failed", "why": ..}
DIR/results/ARM-HASH/seed-N/TASK         results of oq2vl_jax.eval
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oq2vl_jax.config import TrainConfig
from oq2vl_jax.errors import UserError
from oq2vl_jax.lab.definition import AGAIN, ROUNDING
from oq2vl_jax.lab.plan import Arm, Plan, candidates, hash_of, rounding_stages, tuned
from oq2vl_jax.lab.runs import last_values
from oq2vl_jax.paths import read_json, write_text

OF_BASELINE = "~"
"""Before the name of a check of the baseline: ~again, ~rounding. No arm's name begins with it."""
CELL = "cell.json"


@dataclass(frozen=True)
class Cell:
    """arm: its name, or a check of the baseline. is_tuning: a candidate on a seed that does not judge."""

    arm: str
    seed: int
    stages: dict[str, TrainConfig]
    is_tuning: bool = False

    @property
    def name(self) -> str:
        return f"{self.arm}-{hash_of(self.stages)}/seed-{self.seed}"

    def __str__(self) -> str:
        return f"{self.arm}{' (tuning)' if self.is_tuning else ''} seed {self.seed}"


def run_folder(out: str, cell: Cell) -> Path:
    return Path(out) / "runs" / cell.name


def results_folder(out: str, cell: Cell) -> Path:
    return Path(out) / "results" / cell.name


def status_of(out: str, cell: Cell) -> dict[str, Any]:
    """Returns cell.json: {"status": "done" | "failed", ..}; {"status": "open"} before the cell has ended."""
    file = run_folder(out, cell) / CELL
    if not file.is_file():
        return {"status": "open"}
    found = read_json(str(file))
    if not isinstance(found, dict) or found.get("status") not in ("done", "failed"):
        raise UserError(f"{file}: is damaged; remove it, and the cell goes on from its checkpoints.")
    return found


def write_status(out: str, cell: Cell, status: str, **facts: Any) -> None:
    write_text(str(run_folder(out, cell) / CELL), json.dumps({"status": status} | facts, indent=1) + "\n")


def tuning_cells(plan: Plan, arm: Arm) -> list[tuple[dict[str, float], Cell]]:
    """Returns the candidates of an arm, each on every seed of tuning; none without tune."""
    if not plan.ablation.tune:
        return []
    return [
        (factors, Cell(arm.name, seed, tuned(arm, factors), is_tuning=True))
        for factors in candidates(plan.ablation)
        for seed in plan.ablation.tune_seeds
    ]


def chosen_factors(plan: Plan, arm: Arm, out: str) -> dict[str, float] | None:
    """Returns the factors of an arm that were best by the mean of the primary metric; {} without tune; None while
    tuning goes on. A candidate with a failed seed is out; None if all are."""
    if not plan.ablation.tune:
        return {}
    means: list[tuple[float, dict[str, float]]] = []
    cells = tuning_cells(plan, arm)
    if any(status_of(out, cell)["status"] == "open" for _, cell in cells):
        return None
    for factors in candidates(plan.ablation):
        own = [cell for these, cell in cells if these == factors]
        if all(status_of(out, cell)["status"] == "done" for cell in own):
            values = [primary_of(plan, out, cell) for cell in own]
            means.append((sum(values) / len(values), factors))
    if not means:
        return None
    best = min if plan.ablation.is_lower_better else max
    return best(means, key=lambda pair: pair[0])[1]


def primary_of(plan: Plan, out: str, cell: Cell) -> float:
    """Returns the primary metric of a cell that is done."""
    task, _, score = plan.ablation.metric.partition(":")
    if not score:
        last = list(cell.stages)[-1]
        return last_values(run_folder(out, cell) / last)[task]
    return read_json(str(results_folder(out, cell) / "results.json"))[task][score]


def judged_stages(plan: Plan, arm: Arm, out: str) -> dict[str, TrainConfig] | None:
    """Returns the stages that are judged, with the factors that tuning chose; None before it has."""
    factors = chosen_factors(plan, arm, out)
    return None if factors is None else tuned(arm, factors) if factors else arm.stages


def judged_cells(plan: Plan, out: str) -> Iterator[Cell]:
    """Yields the cells that judge and those that check the baseline, seed by seed, as far as tuning has chosen."""
    stages = {name: judged_stages(plan, arm, out) for name, arm in plan.arms.items()}
    baseline = stages[plan.ablation.baseline]
    for number, seed in enumerate(plan.ablation.seeds):
        for name, of_arm in stages.items():
            if of_arm is not None:
                yield Cell(name, seed, of_arm)
        if baseline is not None and number < plan.ablation.floor_seeds:
            chosen = Arm(plan.ablation.baseline, {}, baseline, plan.baseline.work)
            yield Cell(f"{OF_BASELINE}{AGAIN}", seed, baseline)
            yield Cell(f"{OF_BASELINE}{ROUNDING}", seed, rounding_stages(chosen))


def all_cells(plan: Plan, out: str) -> list[Cell]:
    """Returns every cell that is known: first those of tuning, then those that judge."""
    tuning = [cell for arm in plan.arms.values() for _, cell in tuning_cells(plan, arm)]
    return [*tuning, *judged_cells(plan, out)]


def started_from(folder: Path, stage: str, before: str) -> str:
    """Returns the run that a stage starts from, by the name that it had when the stage began: whoever goes on may see
    the folder under another name."""
    file = folder / stage / "config.json"
    return read_json(str(file))["init_from"] if file.is_file() else str(folder / before)


def stage_config(cell: Cell, stage: str, out: str) -> TrainConfig:
    """Returns the configuration that a stage of a cell runs with."""
    names = list(cell.stages)
    before = names[names.index(stage) - 1] if stage != names[0] else None
    config = cell.stages[stage]
    if config.trackers:
        labels = (cell.arm, f"seed-{cell.seed}", stage)
        config = dataclasses.replace(config, tracker_group=Path(out).absolute().name, tracker_tags=labels)
    init_from = config.init_from if before is None else started_from(run_folder(out, cell), stage, before)
    return dataclasses.replace(config, seed=cell.seed, run_dir=str(run_folder(out, cell) / stage), init_from=init_from)
