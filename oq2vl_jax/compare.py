"""python -m oq2vl_jax.compare BASELINE ARM: is a run, or a group of runs of several seeds, better than another?

    python -m oq2vl_jax.compare runs/adamw runs/muon
    python -m oq2vl_jax.compare 'runs/adamw/seed-*' 'runs/muon/seed-*' --smallest-effect 0.01 \\
        --predictions 'results/adamw/seed-*' 'results/muon/seed-*'

BASELINE and ARM are run directories or patterns of them. Runs of equal seeds are paired if they read the same rows.
Prints in which fields the configurations differ, then each loss and each task's accuracy with the difference, its 95 %
interval, p and a verdict: better, worse, equivalent (the interval lies within +-SMALLEST_EFFECT) or undecided.
"""

import json
from dataclasses import dataclass
from typing import Any

import tyro

from oq2vl_jax.bounds import Positive, check_bounds, parse
from oq2vl_jax.errors import UserError, run_command


@dataclass(frozen=True)
class CompareCommand:
    """Compares two runs, or two groups of runs, with statistics."""

    baseline: tyro.conf.Positional[str]
    """Run directory, or a pattern of them in quotes, one a seed."""
    arm: tyro.conf.Positional[str]
    """The same, of the runs with the change."""
    predictions: tuple[str, str] | None = None
    """Two --out folders of oq2vl_jax.eval, or patterns of them, in the order of the runs: baseline and arm."""
    smallest_effect: Positive | None = None
    """The difference that would matter, in nats of a loss and in shares of an accuracy (0.01: one per cent), stated
    before looking; without it nothing is called equivalent."""
    json: bool = False
    """Print the figures as JSON."""


def compare(command: CompareCommand) -> dict[str, Any]:
    """Returns {"changes", "environment", "seeds", "are_pairs", "rows": [..]}. Raises UserError."""
    from oq2vl_jax.lab.runs import (
        changed_environment,
        changed_fields,
        find_runs,
        have_the_same_rows,
        numbers_of,
        read_scores,
    )
    from oq2vl_jax.lab.statistics import crossed, mcnemar, paired, welch

    check_bounds(command, as_flags=True)
    baseline, arm = find_runs("BASELINE", command.baseline), find_runs("ARM", command.arm)
    seeds = [run.seed for run in baseline], [run.seed for run in arm]
    for name, group in (("BASELINE", seeds[0]), ("ARM", seeds[1])):
        if len(set(group)) < len(group):
            raise UserError(f"{name}: seed {max(group, key=group.count)} occurs twice; one run a seed.")
    are_pairs = seeds[0] == seeds[1] and all(map(have_the_same_rows, baseline, arm))
    rows = []
    for name in dict.fromkeys(name for run in (*baseline, *arm) for name in run.numbers):
        before, after = numbers_of(baseline, name), numbers_of(arm, name)
        if before is not None and after is not None:
            found = paired(after, before) if are_pairs else welch(after, before)
            rows.append(row_of(name, before, after, found, command.smallest_effect, is_lower_better=True))
    if command.predictions is not None:
        scores = [read_scores("--predictions", pattern) for pattern in command.predictions]
        for task in sorted(set(scores[0]) & set(scores[1])):
            of_baseline, of_arm = scores[0][task], scores[1][task]
            if of_baseline.questions != of_arm.questions:
                raise UserError(f"{task}: baseline and arm were asked other questions, or in another order.")
            means = of_baseline.scores.mean(1), of_arm.scores.mean(1)
            is_crossed = len(means[0]) == len(means[1])  # pairs or not: the questions are the same
            found = crossed(of_arm.scores, of_baseline.scores, of_arm.clusters) if is_crossed else welch(*means[::-1])
            row = row_of(f"{task}: accuracy", *means, found, command.smallest_effect, is_lower_better=False)
            if len(means[0]) == len(means[1]) == 1:
                row["mcnemar_p"] = mcnemar(of_arm.scores[0], of_baseline.scores[0])
            rows.append(row)
    changes = {name: list(pair) for name, pair in changed_fields(baseline[0], arm[0]).items()}
    environment = {name: list(pair) for name, pair in changed_environment(baseline[0], arm[0]).items()}
    return {
        "changes": changes,
        "environment": environment,
        "seeds": [list(group) for group in seeds],
        "are_pairs": are_pairs,
        "rows": rows,
    }


def row_of(
    name: str, baseline: Any, arm: Any, found: Any, smallest_effect: float | None, is_lower_better: bool
) -> dict[str, Any]:
    from oq2vl_jax.lab.statistics import verdicts

    verdict = verdicts({"arm": found}, smallest_effect or 0.0, is_lower_better)["arm"]
    return {
        "metric": name, "baseline": sum(baseline) / len(baseline), "arm": sum(arm) / len(arm),
        "difference": found.mean, "low": found.low, "high": found.high, "p": found.p, "how": found.how,
        "sign_flip_p": found.sign_flip_p, "correlation": found.correlation, "verdict": verdict.word,
        "why": verdict.why,
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    for name, (before, after) in result["changes"].items():
        print(f"{name}: {before} -> {after}")
    if not result["changes"]:
        print("the configurations are the same")
    for name, (before, after) in result["environment"].items():
        print(f"environment, {name}: {before} -> {after}")
    numbers = [len(group) for group in result["seeds"]]
    pairs = "paired by seed" if result["are_pairs"] else "not paired: other seeds, or other rows"
    print(f"{numbers[0]} runs against {numbers[1]}, {pairs}\n")
    for row in result["rows"]:
        interval = f" [{row['low']:+.4g}, {row['high']:+.4g}]" if row["low"] is not None else ""
        p = f", p {row['p']:.2g}" if row["p"] is not None else ""
        p += f", sign-flip p {row['sign_flip_p']:.2g}" if row["sign_flip_p"] is not None else ""
        p += f", McNemar p {row['mcnemar_p']:.2g}" if "mcnemar_p" in row else ""
        means = f"{row['baseline']:.4f} -> {row['arm']:.4f}"
        print(f"{row['metric']}: {means}, difference {row['difference']:+.4g}{interval}{p}")
        print(f"    {row['verdict']}: {row['why']}")


def main() -> None:
    command = parse(CompareCommand, prog="python -m oq2vl_jax.compare")
    result = compare(command)
    if command.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)


if __name__ == "__main__":
    run_command(main)
