"""What an ablation will cost and can detect, as far as earlier cells tell: python -m oq2vl_jax.ablate plan."""

from typing import NamedTuple

import numpy as np

from oq2vl_jax.errors import UserError
from oq2vl_jax.lab.definition import Ablation
from oq2vl_jax.lab.plan import Plan, candidates
from oq2vl_jax.lab.registration import read_plan
from oq2vl_jax.lab.results import Results, changes_of, collect, full_name
from oq2vl_jax.lab.statistics import detectable_effect


class Measured(NamedTuple):
    """spread: standard deviation of the difference of a pair of seeds in the primary metric; where: how it was found.
    flops_per_second: of the cells that have ended."""

    spread: float | None = None
    where: str = ""
    question_error: float = 0.0
    flops_per_second: float | None = None


def measured(ablation: Ablation, out: str | None) -> Measured:
    """Returns what a folder of an ablation tells about noise and speed. Raises UserError if there is none."""
    if out is None:
        return Measured()
    plan = read_plan(out)
    if plan is None:
        raise UserError(f"--out {out}: no plan.json; it is no folder of an ablation.")
    results = collect(plan, out)
    seconds = sum(one.seconds for one in results.done)
    flops = sum(v for one in results.done for name, v in one.numbers.items() if name.endswith(":total_model_flops"))
    speed = flops / seconds if seconds else None
    return noise_of(results, full_name(plan, ablation.metric))._replace(flops_per_second=speed)


def noise_of(results: Results, metric: str) -> Measured:
    """Returns the noise of paired differences; without two arms that of the baseline's seeds, times the root of 2."""
    found = [one[metric].difference for one in results.comparisons.values() if metric in one]
    found = [one for one in found if one.spread]
    if found:
        spread, of_questions = (
            float(np.sqrt(np.mean(np.square([getattr(one, name) for one in found]))))
            for name in ("spread", "question_error")
        )
        return Measured(spread, "pairs of seeds, and the questions" if of_questions else "pairs of seeds", of_questions)
    baseline = [one.numbers[metric] for one in results.of_arm(results.plan.ablation.baseline) if metric in one.numbers]
    if len(baseline) > 1:
        return Measured(float(np.std(baseline, ddof=1) * np.sqrt(2)), "the baseline's seeds, as if not paired")
    return Measured()


def as_text(plan: Plan, known: Measured) -> str:
    ablation = plan.ablation
    number = len(ablation.seeds)
    lines = [ablation.question, ""]
    for name, arm in plan.arms.items():
        role = " (baseline)" if name == ablation.baseline else ""
        about = "" if all(work.is_counted for work in arm.work.values()) else "about "
        lines.append(f"{name}{role}: {about}{arm.tokens:,.0f} tokens, {arm.flops:.3g} model FLOPs a seed"
                     f"{hours(arm.flops, known)}")  # fmt: skip
        lines += [f"    {stage}: {config.num_steps:,} steps" for stage, config in arm.stages.items()]
        if name != ablation.baseline:
            changes = changes_of_plan(plan, name)
            lines += [f"    {key}: {before} -> {after}" for key, (before, after) in changes.items()]
            lines += [] if changes else ["    changes nothing"]
    total = number * sum(arm.flops for arm in plan.arms.values())
    total += 2 * min(ablation.floor_seeds, number) * plan.baseline.flops
    if ablation.tune:
        tries = len(candidates(ablation)) * len(ablation.tune_seeds)
        total += tries * sum(arm.flops for arm in plan.arms.values())
        lines.append(f"tuning: {len(candidates(ablation))} candidates x {len(ablation.tune_seeds)} seeds for each arm")
    cells = number * len(plan.arms) + 2 * min(ablation.floor_seeds, number)
    lines += ["", f"{len(plan.arms)} arms x {number} seeds, matched by {ablation.match}: {cells} cells that judge, "
              f"{total:.3g} model FLOPs{hours(total, known)}"]  # fmt: skip
    lines.append(f"decided by {ablation.metric}; smallest effect that matters: {ablation.smallest_effect:g}")
    effect = detectable_effect(known.spread, number, question_error=known.question_error) if known.spread else None
    if effect is not None:
        lines.append(f"{number} seeds find an effect of {effect:.3g} in 80 % of all cases (noise: {known.where})")
    else:
        lines.append("what it can detect is not known yet: --out of an ablation with finished cells tells the noise")
    return "\n".join(lines)


def changes_of_plan(plan: Plan, name: str) -> dict[str, tuple]:
    return changes_of(Results(plan, [], {}, [], {}, 0.0, None), name)


def hours(flops: float, known: Measured) -> str:
    return f", {flops / known.flops_per_second / 3600:.2f} hours" if known.flops_per_second else ""
