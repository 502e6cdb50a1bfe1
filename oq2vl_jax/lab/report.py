"""Writes what an ablation found as text: report.md, which pastes into a paper or an issue.

It holds nothing that depends on when or how often the cells were started; how long they took is in report.html.
"""

import os
import shlex
from collections.abc import Iterable
from typing import Any

from oq2vl_jax.lab.cells import OF_BASELINE
from oq2vl_jax.lab.definition import ROUNDING
from oq2vl_jax.lab.results import Comparison, Results, changes_of, environments, full_name, is_judged, speed_up_of

METRIC_FORMAT = "{:.4f}"
FARTHEST = 50
"""Per cent of the baseline's steps up to which its slope at the end is taken for a straight line."""


def as_markdown(results: Results, file: str, out: str) -> str:
    ablation = results.plan.ablation
    lines = [f"# {ablation.question}", ""]
    lines += [f"- {line}" for line in answers(results)]
    lines += ["", *table(verdict_header(results), verdict_rows(results)), "", notes_on_table(results)]
    others = other_rows(results)
    if others:
        lines += ["", "## Other metrics", ""]
        lines += table(("metric", "arm", "baseline", "arm's mean", "difference", "95 % interval"), others)
        lines += ["", "These were not chosen to decide; their intervals are not adjusted for their number."]
    lines += ["", "## Arms", "", *table(("arm", "changes", "steps", "real tokens", "model FLOPs"), arm_rows(results))]
    lines += ["", f"Matched by {ablation.match}. Stages: {stages_text(results)}. Numbers are of one seed."]
    lines += ["", "## How sure the laboratory is", "", *(f"- {line}" for line in checks(results))]
    if results.failed:
        lines += ["", "## Failed", "", *(f"- {cell}: {why}" for cell, why in sorted(results.failed.items()))]
    if results.missing:
        lines += ["", f"## Missing: {len(results.missing)}", "", ", ".join(results.missing)]
    lines += ["", "## Commands", "", "```bash", *commands(file, out), "```", ""]
    return "\n".join(lines)


def answers(results: Results) -> list[str]:
    """Returns a sentence for each arm: its verdict."""
    plan = results.plan
    metric = full_name(plan, plan.ablation.metric)
    sentences = []
    for arm in other_arms(results):
        found = results.comparisons[arm].get(metric)
        verdict = found.verdict if found is not None else None
        if found is None or verdict is None:
            sentences.append(f"**{arm}: no verdict**, {why_none(results, arm)}.")
            continue
        sentences.append(
            f"**{arm} is {verdict.word}**{than(verdict.word, plan.ablation.baseline)}: {metric} {change_text(found)}; "
            f"{verdict.why}."
        )
    return sentences


def than(word: str, baseline: str) -> str:
    return {"better": f" than {baseline}", "worse": f" than {baseline}", "equivalent": f" to {baseline}"}.get(word, "")


def why_none(results: Results, arm: str) -> str:
    names = {arm, results.plan.ablation.baseline}
    failed = [cell for cell in results.failed if cell.split(" seed ")[0].removesuffix(" (tuning)") in names]
    if failed:
        return f"{len(failed)} of its cells or the baseline's failed"
    number = len(results.plan.ablation.seeds)
    done = min(len(results.of_arm(name)) for name in names)
    if done == number:
        return "incomplete: a check of the baseline is missing"
    return f"incomplete: {done} of {number} seeds are done"


def change_text(found: Comparison) -> str:
    one = found.difference
    interval = f" [{one.low:+.4g}, {one.high:+.4g}]" if one.low is not None and one.high is not None else ""
    return f"{found.means[0]:.4g} -> {found.means[1]:.4g}, difference {one.mean:+.4g}{interval}"


def other_arms(results: Results) -> list[str]:
    return [arm for arm in results.plan.arms if arm != results.plan.ablation.baseline]


def verdict_header(results: Results) -> tuple[str, ...]:
    metric = full_name(results.plan, results.plan.ablation.metric)
    return ("arm", "seeds", metric, "difference", "95 % interval", "p (Holm)", "sign-flip p", "pairs' r", "verdict")


def verdict_rows(results: Results) -> list[tuple[str, ...]]:
    plan = results.plan
    metric = full_name(plan, plan.ablation.metric)
    number = len(plan.ablation.seeds)
    baseline = results.of_arm(plan.ablation.baseline)
    values = [one.numbers[metric] for one in baseline if metric in one.numbers]
    mean = METRIC_FORMAT.format(sum(values) / len(values)) if values else "-"
    name = plan.ablation.baseline
    rows = [(name if name == "baseline" else f"{name} (baseline)", f"{len(baseline)} of {number}", mean, *["-"] * 6)]
    for arm in other_arms(results):
        found = results.comparisons[arm].get(metric)
        seeds = f"{len(results.of_arm(arm))} of {number}"
        if found is None:
            rows.append((arm, seeds, *["-"] * 6, "none"))
            continue
        one, verdict = found.difference, found.verdict
        rows.append(
            (arm, seeds, METRIC_FORMAT.format(found.means[1]), f"{one.mean:+.4g}", interval_text(found),
             number_text(verdict.p if verdict else None), number_text(one.sign_flip_p), number_text(one.correlation),
             f"**{verdict.word}**" if verdict else "none")
        )  # fmt: skip
    return rows


def interval_text(found: Comparison) -> str:
    one = found.difference
    return f"{one.low:+.4g} to {one.high:+.4g}" if one.low is not None and one.high is not None else "-"


def number_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def notes_on_table(results: Results) -> str:
    ablation = results.plan.ablation
    better = "lower" if ablation.is_lower_better else "higher"
    how = {found.difference.how for of_arm in results.comparisons.values() for found in of_arm.values()}
    words = {
        "paired": "Differences are paired by seed (same initial weights, same rows): Student's t.",
        "crossed": "In scores seeds and questions both vary, questions of one picture together (analysis of variance "
                   "of crossed random effects).",
        "welch": "Where the rows differ, losses of equal seeds are no pairs: Welch's t.",
        "questions": "One seed: the questions alone vary, and the seeds were not sampled.",
    }  # fmt: skip
    said = " ".join(text for key, text in words.items() if key in how)
    return (
        f"{better.capitalize()} is better. Before the first run a difference below {ablation.smallest_effect:g} was "
        f"said not to matter: equivalent means that the interval lies within it. {said}"
    )


def other_rows(results: Results) -> list[tuple[str, ...]]:
    primary = full_name(results.plan, results.plan.ablation.metric)
    return [
        (metric, arm, METRIC_FORMAT.format(found.means[0]), METRIC_FORMAT.format(found.means[1]),
         f"{found.difference.mean:+.4g}", interval_text(found))
        for arm in other_arms(results)
        for metric, found in results.comparisons[arm].items()
        if metric != primary
    ]  # fmt: skip


def arm_rows(results: Results) -> list[tuple[str, ...]]:
    rows = []
    for name, arm in results.plan.arms.items():
        changes = changes_of(results, name)
        text = "; ".join(f"{key}: {short(before)} -> {short(after)}" for key, (before, after) in changes.items())
        steps = " + ".join(f"{config.num_steps:,}" for config in arm.stages.values())
        rows.append((name, text or "-", steps, f"{arm.tokens:,.0f}", f"{arm.flops:.3g}"))
    return rows


def short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def stages_text(results: Results) -> str:
    return ", ".join(f"{name} ({path})" for name, path in results.plan.ablation.stages.items())


def checks(results: Results) -> list[str]:
    """Returns what was done to trust the differences."""
    plan, ablation = results.plan, results.plan.ablation
    lines = []
    if results.again is not None:
        exact = "exactly 0" if results.again == 0 else f"up to {results.again:.3g}; this device does not repeat a sum"
        lines.append(f"The baseline run again differs by {exact}, over all its numbers.")
    if results.floor:
        lines.append(
            f"Rounding alone (other rows_per_device) moves the mean of {len(ablation.seeds)} seeds by about "
            f"{results.floor:.3g}; an effect below it is none."
        )
    unmeasured = [cell for cell in results.failed if cell.startswith(f"{OF_BASELINE}{ROUNDING}")]
    if unmeasured or not ablation.floor_seeds:
        lines.append("What rounding alone does was not measured.")
    metric = full_name(plan, ablation.metric)
    for arm in other_arms(results):
        found = results.comparisons[arm].get(metric)
        if found is not None and found.difference.spread:
            from oq2vl_jax.lab.statistics import detectable_effect

            one, number = found.difference, found.difference.num_seeds
            effect = detectable_effect(
                one.spread or 0.0, number, question_error=one.question_error, degrees=one.degrees
            )
            lines.append(f"{arm}: {number} seeds find an effect of {effect:.3g} in about 80 % of all cases.")
        saved = speed_up_of(results, arm) if is_judged(results, arm) else None
        if saved is not None:
            lines.append(f"{arm}: {speed_up_text(*saved)}.")
    if ablation.tune:
        tried = ", ".join(f"{key} x {', '.join(f'{f:g}' for f in factors)}" for key, factors in ablation.tune.items())
        lines.append(f"Tuned alike for all arms on seeds {', '.join(map(str, ablation.tune_seeds))}: {tried}.")
    varied = {name: values for name, values in environments(results).items() if len(values) > 1}
    lines += [f"Cells ran with different {name}: {', '.join(map(short, values))}." for name, values in varied.items()]
    return lines


def speed_up_text(loss: str, percent: float) -> str:
    word = "saves" if percent > 0 else "costs"
    if abs(percent) > FARTHEST:
        return f"its last {loss} {word} more steps than a straight line through the baseline's end can tell"
    share = f"about {abs(percent):.0f} % of the baseline's steps"
    return f"its last {loss} {word} {share}, by the slope at the baseline's end (a linear guess)"


def commands(file: str, out: str) -> Iterable[str]:
    words = ["python", "-m", "oq2vl_jax.ablate"]
    where = ["--out", os.path.normpath(out)]
    return [shlex.join([*words, "plan", file]), *(shlex.join([*words, one, file, *where]) for one in ("run", "report"))]


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    cells = list(header)
    lines = [cells, ["---"] * len(cells), *map(list, rows)]
    return ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]
