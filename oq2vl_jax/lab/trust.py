"""Says how sure the laboratory is of its differences: checks of the baseline, power, steps saved, machines."""

import math
from pathlib import Path
from typing import Any

from oq2vl_jax.lab.cells import OF_BASELINE
from oq2vl_jax.lab.definition import ROUNDING
from oq2vl_jax.lab.resolve import value_at
from oq2vl_jax.lab.results import Results, environments, full_name, is_judged, other_arms, speed_up_of
from oq2vl_jax.lab.statistics import detectable_effect

FARTHEST = 50
"""Per cent of the baseline's steps up to which its slope at the end is taken for a straight line."""


def checks(results: Results) -> list[str]:
    """Returns what was done to trust the differences."""
    plan, ablation = results.plan, results.plan.ablation
    lines = []
    if results.again is not None:
        exact = "exactly 0" if results.again == 0 else f"up to {results.again:.3g}; this device does not repeat a sum"
        lines.append(f"The baseline run again differs by {exact}, over all its numbers.")
    if results.floor:
        lines.append(
            f"With other microbatches the baseline differs by rounding alone, {results.floor:.2g} in the mean of "
            f"{len(ablation.seeds)} seeds; a smaller effect is none."
        )
    unmeasured = [cell for cell in results.failed if cell.startswith(f"{OF_BASELINE}{ROUNDING}")]
    if unmeasured or not ablation.floor_seeds:
        lines.append("What rounding alone does was not measured.")
    metric = full_name(plan, ablation.metric)
    for arm in other_arms(results):
        found = results.comparisons[arm].get(metric)
        if found is not None and found.difference.spread:
            one, number = found.difference, found.difference.num_seeds
            effect = detectable_effect(
                one.spread or 0.0, number, question_error=one.question_error, degrees=one.degrees
            )
            lines.append(
                f"{arm}: with {number} seeds and this spread, a true difference of {effect:.2g} is found in about 80 % "
                "of repetitions."
            )
        saved = speed_up_of(results, arm) if is_judged(results, arm) else None
        if saved is not None:
            lines.append(f"{arm}: {speed_up_text(*saved)}.")
    reused = sum(Path(one.runs[0].folder).parent.is_symlink() for one in results.done)
    if reused:
        lines.append(
            f"{reused} of {len(results.done)} cells were taken from another ablation (--reuse): questions that share "
            "their baseline share its luck."
        )
    if ablation.tune:
        lines += tuning_text(results)
    else:
        lines.append("No learning rate was tuned: the arms run with the baseline's, or with what they change.")
    varied = {name: values for name, values in environments(results).items() if len(values) > 1}
    lines += [f"Cells ran with different {name}: {', '.join(map(short, values))}." for name, values in varied.items()]
    return lines


def tuning_text(results: Results) -> list[str]:
    """Returns what was tried for all arms, and what was chosen for each: an end of the range may not be the best."""
    ablation, lines = results.plan.ablation, []
    for key, factors in ablation.tune.items():
        tried = ", ".join(f"{factor:g}" for factor in factors)
        seeds = ", ".join(map(str, ablation.tune_seeds))
        lines.append(f"Tuned alike for all arms, on seeds {seeds} that do not judge: {key} times {tried}.")
        for arm, of_arm in results.plan.arms.items():
            if not results.of_arm(arm):
                continue
            planned, chosen = (
                value_at(stages, key, arm) for stages in (of_arm.stages, results.of_arm(arm)[0].cell.stages)
            )
            is_end = len(factors) > 1 and math.isclose(chosen, planned * max(factors), rel_tol=1e-9)
            end = ", the largest that was tried: a larger one may be better still" if is_end else ""
            lines.append(f"Chosen for {arm}: {key} = {chosen:g}{end}.")
    return lines


def speed_up_text(loss: str, percent: float) -> str:
    word = "saves" if percent > 0 else "costs"
    if abs(percent) > FARTHEST:
        return f"its last {loss} {word} more steps than a linear estimate can tell"
    share = f"about {abs(percent):.0f} % of the baseline's steps"
    return f"its last {loss} {word} {share}, by a linear estimate from the slope at the baseline's end"


def short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
