"""Collects what the cells of an ablation left behind, and compares every arm with the baseline."""

import csv
import dataclasses
import io
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oq2vl_jax.lab.cells import OF_BASELINE, Cell, judged_cells, results_folder, run_folder, status_of, tuning_cells
from oq2vl_jax.lab.definition import AGAIN, LOSSES, ROUNDING, SCORES
from oq2vl_jax.lab.plan import Plan
from oq2vl_jax.lab.runs import (
    Run,
    changed_fields,
    flat,
    have_the_same_rows,
    last_environment,
    last_values,
    read_predictions,
    read_records,
    read_run,
)
from oq2vl_jax.lab.statistics import Difference, Verdict, crossed, paired, speed_up, verdicts, welch
from oq2vl_jax.paths import read_json

DETERMINISTIC = (*LOSSES, "held_out_loss/", "total_tokens", "total_labelled_tokens", "total_images",
                 "total_model_flops")  # fmt: skip
"""Names of metrics.jsonl (or their beginnings) that do not depend on the machine's speed."""


SAME = 1e-9
"""Two sums of the same numbers, up to rounding."""


class Scores(NamedTuple):
    """Scores of one task and seed by question: values and clusters (their pictures) in the order of `questions`."""

    questions: list[str]
    values: np.ndarray
    clusters: list[str]


class CellResult(NamedTuple):
    """numbers: "STAGE:held_out_loss", "TASK:accuracy" .. -> value. scores: "TASK:accuracy" -> by question."""

    cell: Cell
    numbers: dict[str, float]
    scores: dict[str, Scores]
    digest: str
    """parameters_sha256 of the last stage."""
    seconds: float
    runs: list[Run]
    results: Path
    """Folder of its evaluations."""


class Comparison(NamedTuple):
    """An arm against the baseline in one metric. num_seeds: pairs that are there. verdict: None while some are not."""

    metric: str
    means: tuple[float, float]
    difference: Difference
    verdict: Verdict | None


class Results(NamedTuple):
    """done, failed and missing cells; comparisons: arm -> metric -> comparison."""

    plan: Plan
    done: list[CellResult]
    failed: dict[str, str]
    missing: list[str]
    comparisons: dict[str, dict[str, Comparison]]
    floor: float
    again: float | None
    """Largest difference of the baseline run again, over all numbers; None if it was not."""

    def of_arm(self, arm: str) -> list[CellResult]:
        return [result for result in self.done if result.cell.arm == arm]

    @property
    def is_complete(self) -> bool:
        return not self.missing


def collect(plan: Plan, out: str) -> Results:
    """Reads all cells that have ended, and compares. An arm is judged once each of its seeds is done."""
    cells = list(judged_cells(plan, out))
    tuning = [cell for arm in plan.arms.values() for _, cell in tuning_cells(plan, arm)]
    ended = [(cell, status_of(out, cell)) for cell in (*tuning, *cells)]
    failed = {f"{cell} ({cell.name})": status["why"] for cell, status in ended if status["status"] == "failed"}
    missing = [str(cell) for cell, status in ended if status["status"] == "open"]
    missing += [f"{arm} (not tuned yet)" for arm in plan.arms if arm not in {cell.arm for cell in cells}]
    done = [read_cell(plan, out, cell) for cell, status in ended if status["status"] == "done" and not cell.is_tuning]
    results = Results(plan, done, failed, missing, {}, 0.0, None)
    floor, again = floor_of(results), again_of(results)
    results = results._replace(floor=floor, again=again)
    return results._replace(comparisons=compare_all(results))


def unusable(plan: Plan, out: str, cell: Cell) -> str | None:
    """Returns what is wrong with the numbers of a cell that has run, or None."""
    numbers = read_cell(plan, out, cell).numbers
    wrong = [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
    metric = full_name(plan, plan.ablation.metric)
    return "; ".join(wrong) or (None if metric in numbers else f"there is no {metric} to judge by")


def read_cell(plan: Plan, out: str, cell: Cell) -> CellResult:
    numbers: dict[str, float] = {}
    seconds, digest, runs = 0.0, "", []
    for stage in cell.stages:
        folder = run_folder(out, cell) / stage
        last = last_values(folder)
        seconds += last.get("training_seconds", 0.0)
        digest = last["parameters_sha256"]
        numbers |= {f"{stage}:{name}": value for name, value in last.items() if name.startswith(DETERMINISTIC)}
        runs.append(read_run(str(folder)))
    scores: dict[str, Scores] = {}
    predictions = read_predictions(str(results_folder(out, cell)))
    totals = read_json(str(results_folder(out, cell) / "results.json")) if plan.ablation.tasks else {}
    for task in plan.ablation.tasks:
        for score, field in zip(SCORES, ("score", "log_probability"), strict=True):
            asked = {index: record for index, record in predictions[task.name].items() if field in record}
            if score not in totals[task.name]:
                continue
            name, values = f"{task.name}:{score}", np.array([record[field] for record in asked.values()], float)
            numbers[name] = totals[task.name][score]
            if abs(values.mean() - numbers[name]) < SAME:  # else it is a mean over groups of questions
                clusters = [str(record.get("pictures", index)) for index, record in asked.items()]
                scores[name] = Scores(list(asked), values, clusters)
        for category, members in totals[task.name].get("by_category", {}).items():
            for member, found in members.items():
                numbers[f"{task.name}:accuracy/{category}/{member}"] = found["accuracy"]
    return CellResult(cell, numbers, scores, digest, seconds, runs, results_folder(out, cell))


def full_name(plan: Plan, metric: str) -> str:
    """Returns the name of a metric in `numbers`: held-out losses are those of the last stage."""
    return metric if ":" in metric else f"{list(plan.ablation.stages)[-1]}:{metric}"


def metrics_of(results: Results) -> list[str]:
    """Returns the metrics that are compared: the primary one first, then losses and scores."""
    names = dict.fromkeys(name for result in results.done for name in result.numbers)
    compared = [name for name in names if name.split(":")[1] in (*LOSSES, *SCORES)]
    primary = full_name(results.plan, results.plan.ablation.metric)
    return [primary, *(name for name in compared if name != primary)]


def other_arms(results: Results) -> list[str]:
    return [arm for arm in results.plan.arms if arm != results.plan.ablation.baseline]


def is_lower_better(metric: str) -> bool:
    return metric.split(":")[1] not in SCORES


def compare_all(results: Results) -> dict[str, dict[str, Comparison]]:
    plan, arms = results.plan, other_arms(results)
    compared: dict[str, dict[str, Comparison]] = {arm: {} for arm in arms}
    for metric in metrics_of(results):
        means, found = {}, {}
        for arm in arms:
            pair = common_seeds(results, arm, metric)
            if pair:
                means[arm], found[arm] = difference(pair, metric)
        is_primary = metric == full_name(plan, plan.ablation.metric)
        judged = {arm: one for arm, one in found.items() if is_judged(results, arm)}
        words = {}
        if is_primary and judged:
            words = verdicts(
                judged, plan.ablation.smallest_effect, is_lower_better(metric), results.floor, num_arms=len(arms)
            )
        for arm in found:
            compared[arm][metric] = Comparison(metric, means[arm], found[arm], words.get(arm))
    return compared


def is_judged(results: Results, arm: str) -> bool:
    """Returns whether every seed of an arm and of the baseline is done, and the checks of the baseline have ended: no
    stopping by looks, none left out."""
    number = len(results.plan.ablation.seeds)
    are_checked = not any(cell.startswith(OF_BASELINE) for cell in results.missing)
    return are_checked and all(len(results.of_arm(name)) == number for name in (arm, results.plan.ablation.baseline))


def common_seeds(results: Results, arm: str, metric: str) -> list[tuple[CellResult, CellResult]]:
    """Returns (arm, baseline) of the seeds that both have, in the order of the seeds."""
    baseline = {one.cell.seed: one for one in results.of_arm(results.plan.ablation.baseline) if metric in one.numbers}
    return [
        (one, baseline[one.cell.seed])
        for one in results.of_arm(arm)
        if metric in one.numbers and one.cell.seed in baseline
    ]


def difference(pairs: list[tuple[CellResult, CellResult]], metric: str) -> tuple[tuple[float, float], Difference]:
    """Returns ((mean of the baseline, of the arm), their difference)."""
    arm, baseline = ([one.numbers[metric] for one in side] for side in zip(*pairs, strict=True))
    means = float(np.mean(baseline)), float(np.mean(arm))
    scores = [(a.scores[metric], b.scores[metric]) for a, b in pairs if metric in a.scores and metric in b.scores]
    if len(scores) == len(pairs) and all(one.questions == scores[0][0].questions for pair in scores for one in pair):
        values = [np.stack([pair[side].values for pair in scores]) for side in (0, 1)]
        return means, crossed(values[0], values[1], scores[0][0].clusters)
    return means, paired(arm, baseline) if all(have_same_rows(*pair) for pair in pairs) else welch(arm, baseline)


def have_same_rows(a: CellResult, b: CellResult) -> bool:
    return all(map(have_the_same_rows, a.runs, b.runs))


def floor_of(results: Results) -> float:
    """Returns what rounding alone gives the mean over all seeds: the root mean square of the differences of the
    baseline with other microbatches, over the root of the number of seeds."""
    primary = full_name(results.plan, results.plan.ablation.metric)
    found = baseline_again(results, ROUNDING, [primary])
    if not found:
        return 0.0
    return float(np.sqrt(np.mean(np.square(found)) / len(results.plan.ablation.seeds)))


def again_of(results: Results) -> float | None:
    names = list(dict.fromkeys(name for result in results.done for name in result.numbers))
    found = baseline_again(results, AGAIN, names)
    return max(map(abs, found)) if found else None


def baseline_again(results: Results, check: str, names: list[str]) -> list[float]:
    """Returns the differences of the baseline's checks, of all names and seeds that are there."""
    baseline = {one.cell.seed: one for one in results.of_arm(results.plan.ablation.baseline)}
    return [
        one.numbers[name] - baseline[one.cell.seed].numbers[name]
        for one in results.of_arm(f"~{check}")
        if one.cell.seed in baseline
        for name in names
        if name in one.numbers and name in baseline[one.cell.seed].numbers
    ]


def speed_up_of(results: Results, arm: str) -> tuple[str, float] | None:
    """Returns (metric, per cent of the baseline's steps that the arm saves), from a loss of the last stage."""
    last = list(results.plan.ablation.stages)[-1]
    for name in ("held_out_loss", "loss"):
        pairs = common_seeds(results, arm, f"{last}:{name}")
        curves = [curve(one, last, "step", name) for _, one in pairs]
        if pairs and all(len(x) > 3 for x, _ in curves) and len({len(x) for x, _ in curves}) == 1:
            gap = float(np.mean([a.numbers[f"{last}:{name}"] - b.numbers[f"{last}:{name}"] for a, b in pairs]))
            found = speed_up(gap, curves[0][0], np.mean([y for _, y in curves], axis=0))
            if found is not None:
                return name, found
    return None


def curve(result: CellResult, stage: str, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (x, y) of a stage's metrics.jsonl at the records that have y; x of a record is the last one so far."""
    folder = Path(result.runs[list(result.cell.stages).index(stage)].folder)
    points, last = [], {}
    for record in read_records(folder / "metrics.jsonl"):
        if "parameters_sha256" in record:
            continue
        last |= record
        if y in record and x in last:
            points.append((last[x], record[y]))
    pairs = np.array(points, float).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def environments(results: Results) -> dict[str, list[Any]]:
    """Returns what the cells ran on: name -> values that occurred."""
    found: dict[str, list[Any]] = {}
    for result in results.done:
        for run in result.runs:
            for name, value in last_environment(run.folder).items():
                values = found.setdefault(name, [])
                if value not in values:
                    values.append(value)
    return found


def changes_of(results: Results, arm: str) -> dict[str, tuple[Any, Any]]:
    """Returns the fields in which the configurations of an arm differ from the baseline's: "STAGE.KEY" -> both."""
    plan = results.plan
    found = {}
    for stage, config in plan.arms[arm].stages.items():
        a, b = (Run("", flat(values), {}, 0) for values in map(as_dict, (plan.baseline.stages[stage], config)))
        found |= {f"{stage}.{name}": pair for name, pair in changed_fields(a, b).items()}
    return found


def as_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def as_csv(results: Results) -> str:
    """Returns results.csv: a row per cell and metric, in the order of the plan."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "hash", "seed", "metric", "value"])
    for result in results.done:
        folder = result.cell.name.split("/")[0]
        for metric, value in result.numbers.items():
            writer.writerow([result.cell.arm, folder.rpartition("-")[2], result.cell.seed, metric, repr(value)])
        writer.writerow([result.cell.arm, folder.rpartition("-")[2], result.cell.seed, "parameters_sha256",
                         result.digest])  # fmt: skip
    return text.getvalue()
