"""Writes report.html: what an ablation found, for the eye. Differences, curves over four axes, and the questions on
which arms differ most, with their pictures."""

import functools
import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from oq2vl_jax.data.samples.thumbnail import picture
from oq2vl_jax.errors import UserError
from oq2vl_jax.html import page, table
from oq2vl_jax.lab import charts
from oq2vl_jax.lab.definition import Task
from oq2vl_jax.lab.report import (
    ARMS_HEADER,
    answers,
    arm_rows,
    category_rows,
    commands,
    notes_on_table,
    other_labels,
    other_rows,
    stages_text,
    verdict_header,
    verdict_rows,
)
from oq2vl_jax.lab.results import Results, environments, other_arms
from oq2vl_jax.lab.runs import read_records
from oq2vl_jax.lab.trust import checks

QUESTIONS_SHOWN = 12
STYLE = (
    "<style>.answers li{font-size:1.05rem;margin:.3em 0}svg{max-width:100%;height:auto}"
    ".tabs>input{display:none}.tabs>label{padding:4px 14px;cursor:pointer;color:#5a6779}"
    ".tabs>input:checked+label{border-bottom:2px solid #2f6fb5;color:#1d2733}.tabs>div{display:none;margin-top:10px}"
    ".questions{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:18px 24px}"
    ".questions article{border-top:1px solid #e6eaf0;padding-top:8px}.questions img{height:96px;border-radius:4px}"
    ".questions p{margin:.25em 0}pre{background:#f3f5f8;padding:12px;overflow:auto}</style>"
)


def as_page(results: Results, file: str, out: str) -> str:
    """Returns the page. Raises UserError without matplotlib."""
    ablation = results.plan.ablation
    body = [STYLE, '<ul class="answers">']
    body += [f"<li>{bold(line)}</li>" for line in answers(results)]
    body += ["</ul>", charts.forest(results) if results.done else "<p>No cell has ended yet.</p>"]
    body += [markdown_table(verdict_header(results), verdict_rows(results))]
    body += [f'<p class="lead">{html.escape(notes_on_table(results))}</p>']
    for stage in ablation.stages:
        body += [f"<h2>Stage {html.escape(stage)}</h2>", curve_tabs(results, stage)]
    body += ["<h2>Arms</h2>", table(ARMS_HEADER, arm_rows(results))]
    body += [f'<p class="lead">Matched by {ablation.match}. Stages: {html.escape(stages_text(results))}.</p>']
    body += ["<h2>Other metrics</h2>", table(("metric", "arm", "baseline", "arm's mean", "difference", "95 % interval"),
                                            other_rows(results))]  # fmt: skip
    body += [f'<p class="lead">{html.escape(line)}</p>' for line in other_labels(results)]
    by_category = category_rows(results)
    if by_category:
        body += ["<h2>Accuracy by category</h2>", table(("questions", *results.plan.arms), by_category)]
    body += ["<h2>How sure the laboratory is</h2><ul>", *(f"<li>{html.escape(line)}</li>" for line in checks(results))]
    body += [f"<li>{html.escape(line)}</li>" for line in costs(results)] + ["</ul>"]
    if results.failed:
        body += ["<h2>Failed</h2>", table(("cell", "why"), sorted(results.failed.items()))]
    if results.missing:
        body += [f"<h2>Missing: {len(results.missing)} cells</h2><p>{html.escape(', '.join(results.missing))}</p>"]
    for task in ablation.tasks:
        body += differing_questions(results, task)
    body += ["<h2>Commands</h2>", f"<pre>{html.escape(chr(10).join(commands(file, out)))}</pre>"]
    return page(ablation.question, lead(results), body)


def lead(results: Results) -> str:
    ablation = results.plan.ablation
    state = "complete" if results.is_complete else f"incomplete: {len(results.missing)} cells are missing"
    return (
        f"{len(ablation.arms)} arms, seeds {', '.join(map(str, ablation.seeds))}; decided by {ablation.metric}, "
        f"smallest effect {ablation.smallest_effect:g}; {state}."
    )


def bold(line: str) -> str:
    pieces = html.escape(line).split("**")
    return "".join(f"<b>{piece}</b>" if i % 2 else piece for i, piece in enumerate(pieces))


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{bold(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return "<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + f"</tr>{body}</table>"


def curve_tabs(results: Results, stage: str) -> str:
    """Returns the curves of a stage over four axes, one shown at a time."""
    drawn = {x: charts.curves(results, stage, x) for x in charts.AXES}
    if not any(drawn.values()):
        return "<p>No curves yet.</p>"
    tabs, panes, rules = [], [], []
    for number, (x, svg) in enumerate(drawn.items()):
        name = f"{stage}-{number}"
        tabs.append(
            f'<input type="radio" name="x-{html.escape(stage)}" id="{html.escape(name)}"{" checked" * (number == 0)}>'
            f'<label for="{html.escape(name)}">{charts.AXES[x]}</label>'
        )
        panes.append(f"<div>{svg or '<p>not recorded</p>'}</div>")
        rules.append(f".tabs>input:nth-of-type({number + 1}):checked~div:nth-of-type({number + 1}){{display:block}}")
    caption = '<p class="lead">Thin: a seed. Thick: their mean, with a band of one standard deviation.</p>'
    return f'<style>{"".join(rules)}</style><div class="tabs">{"".join(tabs)}{"".join(panes)}</div>{caption}'


def costs(results: Results) -> list[str]:
    """Returns what the cells took, and on what."""
    seconds = sum(one.seconds for one in results.done)
    found = environments(results)
    devices = ", ".join(map(str, found.get("device", ["unknown"])))
    jax = ", ".join(map(str, found.get("versions.jax", ["unknown"])))
    lines = [
        f"{len(results.done)} cells took {seconds / 3600:.2f} hours of training on {devices} with jax {jax}. Other "
        "work on the machine counts: times do not compare the arms."
    ]
    per_cell = {arm: [one.seconds for one in results.of_arm(arm)] for arm in results.plan.arms}
    lines += [
        f"{arm}: {np.mean(times):.0f} s a seed ({min(times):.0f} to {max(times):.0f})."
        for arm, times in per_cell.items()
        if times
    ]
    return lines


def differing_questions(results: Results, task: Task) -> list[str]:
    """Returns the questions whose mean score differs most between an arm and the baseline, both ways."""
    parts = []
    for arm in other_arms(results):
        gaps = gaps_of(results, arm, f"{task.name}:accuracy")
        shown = sorted((index for index in gaps if gaps[index]), key=lambda index: (-abs(gaps[index]), index))
        if shown:
            parts.append(f"<h2>{html.escape(task.name)}: where {html.escape(arm)} differs most</h2>")
            parts.append('<div class="questions">')
            parts += [question(results, arm, task, index, gaps[index]) for index in shown[:QUESTIONS_SHOWN]]
            parts.append("</div>")
    return parts


def gaps_of(results: Results, arm: str, metric: str) -> dict[str, float]:
    """Returns question -> mean score of the arm minus that of the baseline."""
    means = []
    for name in (arm, results.plan.ablation.baseline):
        scores = [one.scores[metric] for one in results.of_arm(name) if metric in one.scores]
        if not scores or any(one.questions != scores[0].questions for one in scores):
            return {}
        means.append(dict(zip(scores[0].questions, np.mean([one.values for one in scores], axis=0), strict=True)))
    return {index: float(means[0][index] - means[1].get(index, 0.0)) for index in means[0]}


def question(results: Results, arm: str, task: Task, index: str, gap: float) -> str:
    item = items_of(task).get(index)
    replies = {name: reply_counts(results, name, task.name, index) for name in (results.plan.ablation.baseline, arm)}
    pictures = "".join(picture(image, "") for image in item.images) if item is not None else ""
    asked = html.escape(item.question) if item is not None else html.escape(index)
    answer = item.choices.get(str(item.answer), str(item.answer)) if item is not None else ""
    said = "".join(f"<p>{html.escape(name)}: {html.escape(text)}</p>" for name, text in replies.items())
    kind = "good" if gap > 0 else "bad"
    return (
        f"<article>{pictures}<p>{asked} <b>{html.escape(answer)}</b></p>{said}"
        f'<p class="{kind}">{gap:+.2f}</p></article>'
    )


@functools.lru_cache
def items_of(task: Task) -> dict[str, Any]:
    """Returns the items of a task by index; none if its files are not here any more."""
    from oq2vl_jax.eval.benchmarks import find_benchmark
    from oq2vl_jax.eval.evaluate import read_items
    from oq2vl_jax.eval.tables import find_files

    try:
        files = find_files(task.data, task.name, find_benchmark(task.name).files)
        return {item.index: item for item in read_items(task.name, files)}
    except UserError:
        return {}


def reply_counts(results: Results, arm: str, task: str, index: str) -> str:
    """Returns the replies of an arm's seeds to a question: "cat (4), dog"."""
    counts: dict[str, int] = {}
    for result in results.of_arm(arm):
        reply = replies_of(result.results / task / "predictions.jsonl").get(index, "")
        counts[reply] = counts.get(reply, 0) + 1
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{reply or 'nothing'}" + (f" ({count})" if count > 1 else "") for reply, count in ordered)


@functools.lru_cache
def replies_of(file: Path) -> dict[str, str]:
    """Returns question -> reply of a predictions.jsonl."""
    return {str(record["index"]): record["reply"].strip() for record in read_records(file)}
