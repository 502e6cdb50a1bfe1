"""Writes results.json and the page of mistakes."""

import html
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from oq2vl_jax.data.samples.thumbnail import picture
from oq2vl_jax.eval.benchmark import Benchmark, Item, Judgement
from oq2vl_jax.html import page, table
from oq2vl_jax.paths import write_text

NUM_RESAMPLES = 2000
JOINED = ","
"""Separator of categories: POPE.tsv holds a question of several splits once, as "popular,random"; it counts in each."""
MISTAKES_SHOWN = 60
SEED = 0
MISTAKE_STYLE = (
    "<style>.mistakes{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:22px 28px}"
    ".mistakes article{border-top:1px solid #e6eaf0;padding-top:10px}.mistakes img{max-width:100%;max-height:200px;"
    "border-radius:4px;background:#f3f5f8}.mistakes p{margin:.35em 0;overflow-wrap:anywhere;white-space:pre-line}"
    ".mistakes figure{display:inline-block;margin-right:6px}</style>"
)


def task_results(
    benchmark: Benchmark,
    items: list[Item],
    judgements: list[Judgement],
    settings: dict[str, Any],
    unreadable: dict[str, str],
    bad_rows: dict[str, str],
) -> dict[str, Any]:
    """Returns the entry of one task in results.json. Scores and rates are 0..1."""
    units = benchmark.combine(items, judgements, settings["profile"])
    scores = np.array([score for _, score in units])
    by_category: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for item, score in units:
        for kind, value in item.categories.items():
            for one in value.split(JOINED):
                by_category[kind][one].append(score)
    return {
        "accuracy": float(scores.mean()),
        "interval_95": bootstrap_interval(scores),
        "num_units": len(units),
        "num_items": len(items),
        "metrics": benchmark.extra(items, judgements),
        "by_category": {
            kind: {value: {"accuracy": float(np.mean(s)), "num_units": len(s)} for value, s in sorted(values.items())}
            for kind, values in sorted(by_category.items())
        },
        "unparsed_rate": sum(judgement.parsed is None for judgement in judgements) / len(judgements),
        "unreadable_images": unreadable,
        "bad_rows": bad_rows,
        **settings,
    }


def bootstrap_interval(scores: np.ndarray) -> list[float]:
    """Returns the 95 % interval of the mean by the percentile bootstrap: 2,000 resamples with a fixed seed."""
    rng = np.random.default_rng(SEED)
    means = [scores[rng.integers(0, len(scores), len(scores))].mean() for _ in range(NUM_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return [float(low), float(high)]


def write_results(out: Path, results: dict[str, Any]) -> None:
    """Writes results.json. Results of other tasks from earlier commands in OUT are kept."""
    file = out / "results.json"
    previous = json.loads(file.read_text()) if file.exists() else {}
    write_text(str(file), json.dumps(dict(sorted((previous | results).items())), indent=2) + "\n")


def write_mistakes(
    path: Path,
    benchmark: Benchmark,
    items: list[Item],
    judgements: list[Judgement],
    predictions: dict[str, str],
    result: dict[str, Any],
) -> None:
    """Writes a page with the numbers and a random sample of the items that scored below 1."""
    wrong = [(item, judgement) for item, judgement in zip(items, judgements, strict=True) if judgement.score < 1]
    shown = random.Random(SEED).sample(wrong, min(MISTAKES_SHOWN, len(wrong)))
    low, high = result["interval_95"]
    lead = (
        f"{100 * result['accuracy']:.1f} % of {result['num_units']:,} (95 % interval {100 * low:.1f} to "
        f"{100 * high:.1f}), profile {result['profile']}, by {result['method']}; unparsed "
        f"{100 * result['unparsed_rate']:.1f} %. {result['checkpoint']}"
    )
    body = [MISTAKE_STYLE]
    for kind, values in result["by_category"].items():
        body.append(f"<h2>By {html.escape(kind.replace('_', ' '))}</h2>")
        rows = [(name, value["num_units"], value["accuracy"]) for name, value in values.items()]
        body.append(table(("", "questions", "accuracy"), rows))
    if result["metrics"]:
        body += ["<h2>Further metrics</h2>", table(("", "value"), result["metrics"].items())]
    body.append(f"<h2>{len(shown)} of {len(wrong):,} mistakes</h2>")
    body.append('<div class="mistakes">')
    body += [mistake(item, judgement, predictions[item.index]) for item, judgement in shown]
    body.append("</div>")
    write_text(str(path), page(f"{benchmark.name}: mistakes", lead, body))


def mistake(item: Item, judgement: Judgement, reply: str) -> str:
    pictures = "".join(picture(image, "") for image in item.images) or "<p class='bad'>no image</p>"
    options = "".join(f"\n{letter}. {text}" for letter, text in item.choices.items() if letter != text)
    answer = "; ".join(dict.fromkeys(item.answer)) if isinstance(item.answer, list) else item.answer
    said = f" (taken as {judgement.parsed})" if judgement.parsed not in (None, reply) else ""
    said = " (no answer found in it)" if judgement.parsed is None else said
    return (
        f"<article>{pictures}<p>{html.escape(item.question + options)}</p>"
        f"<p class='bad'>{html.escape(reply) or '<i>empty</i>'}{html.escape(said)}</p>"
        f"<p class='good'>{html.escape(str(answer))}</p><p class='lead'>row {html.escape(item.index)}</p></article>"
    )
