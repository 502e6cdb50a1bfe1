"""Writes what an ablation found as text: report.md, which pastes into a paper or an issue.

It holds nothing that depends on when or how often the cells were started; how long they took is in report.html.
"""

import os
import shlex
from collections.abc import Iterable

from oq2vl_jax.lab.results import (
    Comparison,
    Results,
    changes_of,
    common_seeds,
    full_name,
    other_arms,
)
from oq2vl_jax.lab.statistics import p_text
from oq2vl_jax.lab.trust import checks, short

METRIC_FORMAT = "{:.4f}"
ARMS_HEADER = ("arm", "changes", "steps", "real tokens, planned", "model FLOPs, planned")
LABELS_DIFFER = 0.005
"""Share of the labelled tokens from which on the losses of two arms are means over other tokens."""


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
        lines += other_labels(results)
    by_category = category_rows(results)
    if by_category:
        lines += ["", "## Accuracy by category", "", *table(("questions", *results.plan.arms), by_category)]
    lines += ["", "## Arms", "", *table(ARMS_HEADER, arm_rows(results))]
    lines += ["", f"Matched by {ablation.match}. Stages: {stages_text(results)}. Planned numbers are of one seed."]
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


def verdict_header(results: Results) -> tuple[str, ...]:
    metric = full_name(results.plan, results.plan.ablation.metric)
    return (
        "arm",
        "seeds",
        metric,
        "difference",
        "95 % interval",
        "p (Holm)",
        "sign-flip p",
        "correlation of pairs",
        "verdict",
    )


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
             p_of(verdict.p if verdict else None), number_text(one.sign_flip_p), number_text(one.correlation),
             f"**{verdict.word}**" if verdict else "none")
        )  # fmt: skip
    return rows


def interval_text(found: Comparison) -> str:
    one = found.difference
    return f"{one.low:+.4g} to {one.high:+.4g}" if one.low is not None and one.high is not None else "-"


def number_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def p_of(value: float | None) -> str:
    return "-" if value is None else p_text(value).removeprefix("p ").removeprefix("= ")


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
    number = len(ablation.seeds)
    words["paired"] += f" With {number} pairs the sign-flip p is at least {2 / 2**number:.2g}."
    said = " ".join(text for key, text in words.items() if key in how)
    return (
        f"{better.capitalize()} is better. Before the first run a difference below {ablation.smallest_effect:g} was "
        f"said not to matter: equivalent means that the interval lies within it. {said}"
    )


def other_labels(results: Results) -> list[str]:
    """Returns a warning for each stage in which an arm's loss is a mean over other tokens than the baseline's."""
    lines = []
    for arm in other_arms(results):
        for stage in results.plan.ablation.stages:
            name = f"{stage}:total_labelled_tokens"
            pairs = common_seeds(results, arm, name)
            more = [a.numbers[name] / b.numbers[name] - 1 for a, b in pairs]
            if more and abs(sum(more)) / len(more) > LABELS_DIFFER:
                share = 100 * sum(more) / len(more)
                lines.append(
                    f"{arm} labels {abs(share):.0f} % {'more' if share > 0 else 'fewer'} tokens than "
                    f"{results.plan.ablation.baseline} in {stage}: the two losses are means over different tokens."
                )
    return lines


def category_rows(results: Results) -> list[tuple[str, ...]]:
    """Returns a row for each category of questions: the mean accuracy of every arm. None were chosen to decide."""
    names = dict.fromkeys(name for one in results.done for name in one.numbers if ":accuracy/" in name)
    rows = []
    for name in names:
        task, _, rest = name.partition(":accuracy/")
        values = [
            [one.numbers[name] for one in results.of_arm(arm) if name in one.numbers] for arm in results.plan.arms
        ]
        means = [METRIC_FORMAT.format(sum(found) / len(found)) if found else "-" for found in values]
        rows.append((f"{task}, {rest.replace('/', ': ', 1)}", *means))
    return rows


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


def stages_text(results: Results) -> str:
    return ", ".join(f"{name} ({path})" for name, path in results.plan.ablation.stages.items())


def commands(file: str, out: str) -> Iterable[str]:
    words = ["python", "-m", "oq2vl_jax.ablate"]
    where = ["--out", os.path.normpath(out)]
    return [shlex.join([*words, "plan", file]), *(shlex.join([*words, one, file, *where]) for one in ("run", "report"))]


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    cells = list(header)
    lines = [cells, ["---"] * len(cells), *map(list, rows)]
    return ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]
