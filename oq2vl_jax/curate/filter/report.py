"""Reports what a filter did: counts, overlaps, score distributions, and a sheet of kept and rejected pictures."""

import html
import itertools
import math
import random
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from oq2vl_jax import paths
from oq2vl_jax.curate.filter.apply import Result, Selection
from oq2vl_jax.curate.filter.expression import Expression, Leaf, evaluate, leaves, takes_away
from oq2vl_jax.curate.filter.pool import Pool
from oq2vl_jax.data.samples.formats import read_whole_samples
from oq2vl_jax.data.samples.ids import parse_uid
from oq2vl_jax.data.samples.shards import Sample
from oq2vl_jax.data.samples.tars import CutOffError
from oq2vl_jax.data.samples.thumbnail import picture
from oq2vl_jax.data.samples.uids import UidSet
from oq2vl_jax.html import bars, page, table

NUM_BINS = 40
LOOKED_AT_PER_PICTURE = 20
"""Samples read from the tars for each picture shown; the pictures are drawn from them at random."""


class Picture(NamedTuple):
    image: bytes
    text: str
    is_kept: bool
    against: list[str]
    """Rules that speak against it: those that are false, and true ones behind a difference (-)."""


def make_report(selection: Selection, pool: Pool, result: Result) -> dict:
    written = [*leaves(selection.expression)]
    basic = [leaf for leaf in result.keeps if leaf not in written]
    num_kept = int(result.kept.sum())
    return {
        "expression": selection.config.expression,
        "seed": selection.config.seed,
        "samples": len(pool),
        "kept": num_kept,
        "uids": len(result.uids),
        "repeated_uids": num_kept - len(result.uids),
        "invalid_uids": int((~pool.is_valid).sum()),
        "rules": {
            str(leaf): {
                "true": int(result.keeps[leaf].sum()),
                "decided_by_it_alone": int((result.kept != kept_without(selection.expression, result, leaf)).sum()),
            }
            for leaf in written
        },
        "basic_rules": {str(leaf): {"true": int(result.keeps[leaf].sum())} for leaf in basic},
        "thresholds": thresholds_by_column(selection, result),
        "overlap": {
            f"{a} / {b}": int((result.keeps[a] & result.keeps[b]).sum()) for a, b in itertools.combinations(written, 2)
        },
        "conflicting_scores": pool.conflicts,
        "scores": {column: distribution(values) for column, values in pool.values.items()},
    }


def thresholds_by_column(selection: Selection, result: Result) -> dict[str, dict[str, float]]:
    """Returns the threshold of each score rule by column: {"clip_score": {"clip_top(0.3)": 0.31}}."""
    thresholds: dict[str, dict[str, float]] = {}
    for rule in selection.rules:
        value = result.thresholds.get(rule.leaf, rule.threshold)
        if rule.column and value is not None and math.isfinite(value):
            thresholds.setdefault(rule.column, {})[str(rule.leaf)] = value
    return thresholds


def kept_without(expression: Expression, result: Result, leaf: Leaf) -> np.ndarray:
    """Returns a mask of the samples that the expression would keep if the rule `leaf` were true for none."""
    return evaluate(expression, lambda rule: result.keeps[rule] & (rule != leaf))


def distribution(values: np.ndarray) -> dict:
    """Counts scores in NUM_BINS bins of equal width; integer scores get bins of a whole-number width."""
    scored = values[np.isfinite(values)]
    if not len(scored):
        return {"scored": 0, "bins": {}}
    low, high = float(scored.min()), float(scored.max())
    if (scored == np.round(scored)).all():
        step = max(1, int(np.ceil((high - low + 1) / NUM_BINS)))
        edges = np.arange(low, high + step + 1, step)
    else:
        edges = np.linspace(low, high, NUM_BINS + 1) if high > low else np.array([low, low + 1])
    counts, edges = np.histogram(scored, edges)
    return {"scored": len(scored), "bins": {f"{edge:.6g}": int(n) for edge, n in zip(edges, counts, strict=False)}}


def choose_pictures(shards: list[str], pool: Pool, selection: Selection, result: Result, count: int) -> list[Picture]:
    """Draws up to `count` kept and `count` rejected samples from the first samples of the tars. Samples that are not in
    the pool are left out."""
    candidates = []
    for sample in itertools.chain.from_iterable(map(whole_samples, shards)):
        parsed = parse_uid(sample.uid)
        if parsed and sample.images and sample.text is not None:
            candidates.append((parsed, sample))
        if len(candidates) >= 2 * count * LOOKED_AT_PER_PICTURE:
            break
    if not candidates:
        return []
    wanted = UidSet(*np.array([uid for uid, _ in candidates], np.uint64).T)
    places = np.flatnonzero(wanted.contains(pool.high, pool.low))
    place_of = {(int(pool.high[i]), int(pool.low[i])): i for i in places}
    pictures, taking = [], takes_away(selection.expression)
    for uid, sample in candidates:
        if uid in place_of:
            place = place_of[uid]
            against = [
                f"{leaf}" if leaf in taking else f"not {leaf}"
                for leaf, keep in result.keeps.items()
                if keep[place] == (leaf in taking)
            ]
            pictures.append(Picture(sample.images[0], sample.text or "", bool(result.kept[place]), against))
    rng = random.Random(selection.config.seed)
    kept, rejected = ([p for p in pictures if p.is_kept is is_kept] for is_kept in (True, False))
    return [p for group in (kept, rejected) for p in rng.sample(group, min(count, len(group)))]


def whole_samples(shard: str) -> Iterator[Sample]:
    """Yields the samples of a tar. A tar that is cut off gives a note on stderr instead of an error."""
    try:
        yield from read_whole_samples(shard)
    except CutOffError:
        print(f"note: {shard} is broken or cut off; the report shows no pictures of its rest.", file=sys.stderr)


def write_page(path: str, report: dict, pictures: list[Picture]) -> None:
    total = max(report["samples"], 1)
    lead = (
        f"{report['kept']:,} of {report['samples']:,} samples kept ({report['kept'] / total:.1%}), "
        f"{report['uids']:,} ids. Repeated ids {report['repeated_uids']:,}, invalid ids {report['invalid_uids']:,}, "
        f"seed {report['seed']}."
    )
    rules = [
        (name, r["true"], f"{r['true'] / total:.1%}", r["decided_by_it_alone"], threshold_text(report, name))
        for name, r in report["rules"].items()
    ]
    body = [f"<p><code>{html.escape(report['expression'])}</code></p><h2>Rules</h2>"]
    body.append(table(["rule", "true for", "share", "decided by this rule alone", "score"], rules))
    if report["basic_rules"]:
        basic = [(name, r["true"], f"{r['true'] / total:.1%}") for name, r in report["basic_rules"].items()]
        body += ["<h2>Basic rules, each alone</h2>", table(["rule", "true for", "share"], basic)]
    if report["overlap"]:
        body += ["<h2>Overlap</h2>", table(["both rules true", "samples"], report["overlap"].items())]
    if report["scores"]:
        charts = [
            bars(
                f"{column}: {scores['scored']:,} samples scored" + ("; line: threshold of the rule" if marks else ""),
                {float(edge): count for edge, count in scores["bins"].items()},
                marked=marks[0] if marks else None,
            )
            for column, scores in report["scores"].items()
            for marks in [threshold_marks(report, column)]
        ]
        body += [f'<h2>Scores</h2><div class="charts">{"".join(charts)}</div>']
    for is_kept, title in ((True, "Kept"), (False, "Rejected")):
        shown = [picture(p.image, p.text, note_of(p)) for p in pictures if p.is_kept is is_kept]
        if shown:
            body.append(f'<h2>{title}: {len(shown)} at random</h2><div class="sheet">{"".join(shown)}</div>')
    paths.write_text(path, page("Filter report", lead, body))


def note_of(shown: Picture) -> str:
    return "" if shown.is_kept else ", ".join(shown.against)


def threshold_text(report: dict, rule: str) -> str:
    return next((f"{thresholds[rule]:.4g}" for thresholds in report["thresholds"].values() if rule in thresholds), "")


def threshold_marks(report: dict, column: str) -> list[float]:
    return list(report["thresholds"].get(column, {}).values())
