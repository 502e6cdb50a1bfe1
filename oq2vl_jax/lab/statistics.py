"""Statistics of a comparison: differences with intervals, and a verdict.

    paired       runs of equal seeds: same initial weights, same rows; the difference per seed, Student's t
    welch        runs that share no seed, or whose rows differ
    crossed      scores of the same questions by runs of equal seeds: seeds and questions both vary
    questions    one run each: the questions alone vary, and the seeds were not sampled

`crossed` is the analysis of variance of two crossed random effects: the variance of the mean is
(MS_seeds + MS_questions - MS_rest) / (seeds * questions), its degrees of freedom are Satterthwaite's (Searle, Casella
and McCulloch, Variance Components, 1992, section 4.3). Without an effect it calls 2 to 7 % of comparisons different,
with 3 seeds or 10, whether seeds vary or not; a bootstrap over three seeds does not know that they are few.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

ALPHA = 0.05
MAX_EXACT_FLIPS = 16
NUM_RANDOM_FLIPS = 50_000
MAX_SEEDS = 1000
How = Literal["paired", "welch", "crossed", "questions"]
Word = Literal["better", "worse", "equivalent", "undecided"]


class Difference(NamedTuple):
    """An arm's mean minus the baseline's.

    low, high: 95 % interval, None if there is one run on each side and no questions. p: two-sided, of no difference.
    error: standard error of the mean. degrees: its degrees of freedom. spread: standard deviation over one seed, by
    which numbers of seeds are planned. sign_flip_p: exact, needs no normal distribution; None unless paired.
    correlation: of the pairs; near 0 pairing did not help.
    """

    how: How
    mean: float
    low: float | None
    high: float | None
    p: float | None
    error: float | None
    degrees: float | None
    num_seeds: int
    spread: float | None = None
    sign_flip_p: float | None = None
    correlation: float | None = None
    question_error: float = 0.0
    """Part of `error` that more seeds do not lower: that of the questions."""


class Verdict(NamedTuple):
    """word: of the arm against the baseline. p: of a difference, by Holm over the arms. why: a clause."""

    word: Word
    p: float | None
    why: str


def paired(arm: ArrayLike, baseline: ArrayLike) -> Difference:
    """Compares values of the same seeds, in the same order. Shapes: [seeds]."""
    a, b = np.asarray(arm, float), np.asarray(baseline, float)
    difference = a - b
    mean, number = float(difference.mean()), len(difference)
    if number < 2:
        return Difference("paired", mean, None, None, None, None, None, number)
    spread = float(difference.std(ddof=1))
    error = spread / number**0.5
    has_spread = min(a.std(), b.std()) > 0
    correlation = float(np.corrcoef(a, b)[0, 1]) if number > 2 and has_spread else None
    low, high, p = t_interval(mean, error, number - 1)
    return Difference(
        "paired", mean, low, high, p, error, number - 1, number, spread, sign_flip_p(difference), correlation
    )


def welch(arm: ArrayLike, baseline: ArrayLike) -> Difference:
    """Compares values of runs that are not pairs. Shapes: [runs of the arm], [runs of the baseline]."""
    a, b = np.asarray(arm, float), np.asarray(baseline, float)
    mean, number = float(a.mean() - b.mean()), min(len(a), len(b))
    if number < 2:
        return Difference("welch", mean, None, None, None, None, None, number)
    parts = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    error = float(sum(parts) ** 0.5)
    below = parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1)
    degrees = float(sum(parts) ** 2 / below) if below > 0 else float(len(a) + len(b) - 2)
    low, high, p = t_interval(mean, error, degrees)
    return Difference("welch", mean, low, high, p, error, degrees, number, error * number**0.5)


def crossed(arm: ArrayLike, baseline: ArrayLike, clusters: Sequence[object] | None = None) -> Difference:
    """Compares scores of the same questions by the same seeds. Shapes: [seeds, questions].

    clusters: what each question shares with others (a picture, a circular group); None: nothing. One seed: the
    questions alone vary (`questions`).
    """
    scores = np.asarray(arm, float) - np.asarray(baseline, float)
    mean = float(scores.mean())
    groups = grouped(scores, clusters)  # [seeds, clusters], each times its share of the questions
    num_seeds, num_groups = groups.shape
    if num_groups < 2:
        return paired(np.asarray(arm, float).mean(1), np.asarray(baseline, float).mean(1))
    of_seeds, of_groups = groups.mean(1, keepdims=True), groups.mean(0, keepdims=True)
    center = groups.mean()
    ms_groups = num_seeds * float(((of_groups - center) ** 2).sum()) / (num_groups - 1)
    if num_seeds < 2:
        error = (ms_groups / num_groups) ** 0.5
        low, high, p = t_interval(mean, error, num_groups - 1)
        return Difference("questions", mean, low, high, p, error, num_groups - 1, 1)
    ms_seeds = num_groups * float(((of_seeds - center) ** 2).sum()) / (num_seeds - 1)
    rest = (num_seeds - 1) * (num_groups - 1)
    ms_rest = float(((groups - of_seeds - of_groups + center) ** 2).sum()) / rest
    total = max(ms_seeds + ms_groups - ms_rest, ms_seeds, ms_groups)  # never surer than one of them alone
    error = (total / (num_seeds * num_groups)) ** 0.5
    below = ms_seeds**2 / (num_seeds - 1) + ms_groups**2 / (num_groups - 1) + ms_rest**2 / rest
    degrees = total**2 / below if below > 0 else float(num_seeds - 1)
    low, high, p = t_interval(mean, error, degrees)
    over_seeds = paired(np.asarray(arm, float).mean(1), np.asarray(baseline, float).mean(1))
    of_questions = max(0.0, error**2 - (over_seeds.spread or 0.0) ** 2 / num_seeds) ** 0.5
    return over_seeds._replace(
        how="crossed", low=low, high=high, p=p, error=error, degrees=degrees, question_error=of_questions
    )


def grouped(scores: np.ndarray, clusters: Sequence[object] | None) -> np.ndarray:
    """Returns a value for each cluster, whose mean is the mean over questions. Shape: [seeds, clusters].

    Clusters of unequal size: the mean over questions is a ratio, so a cluster's value is that of its linearization
    (Cochran, Sampling Techniques, 6.3). A picture with more questions is not farther from the mean by that alone.
    """
    if clusters is None:
        return scores
    names, place = np.unique(np.asarray(clusters, object).astype(str), return_inverse=True)
    sums = np.zeros((len(scores), len(names)))
    for row, values in zip(sums, scores, strict=True):
        np.add.at(row, place, values)
    mean = scores.mean()
    return mean + (sums - np.bincount(place) * mean) * len(names) / scores.shape[1]


def mcnemar(arm: ArrayLike, baseline: ArrayLike) -> float:
    """Returns the exact two-sided p of McNemar's test over questions that one of two runs answers rightly."""
    a, b = np.asarray(arm) > 0.5, np.asarray(baseline) > 0.5
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return 1.0 if only_a + only_b == 0 else float(stats.binomtest(only_a, only_a + only_b).pvalue)


def t_interval(mean: float, error: float, degrees: float, alpha: float = ALPHA) -> tuple[float, float, float]:
    """Returns (low, high, p); without any spread the interval is the mean, and p is 1 for a mean of 0, else 0."""
    if error == 0:
        return mean, mean, float(mean == 0)
    half = float(stats.t.ppf(1 - alpha / 2, degrees)) * error
    return mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, degrees))


def sign_flip_p(differences: ArrayLike) -> float:
    """Returns the share of all choices of signs with a mean at least as far from 0; above 16 pairs of random ones."""
    d = np.asarray(differences, float)
    sums, observed = np.abs(signs_of(len(d)) @ d), abs(d.sum())
    return float((sums >= observed * (1 - 1e-12) - 1e-300).mean())


@functools.lru_cache(maxsize=32)
def signs_of(number: int) -> np.ndarray:
    """Returns choices of signs, each a row: all of them, or random ones after the first. Shape: [choices, number]."""
    if number <= MAX_EXACT_FLIPS:
        return np.array(list(itertools.product((1.0, -1.0), repeat=number)))
    signs = np.random.default_rng(0).choice((1.0, -1.0), (NUM_RANDOM_FLIPS, number))
    signs[0] = 1
    return signs


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p of each comparison, adjusted for all of them (Holm 1979)."""
    order = np.argsort(p_values)
    adjusted, so_far = [0.0] * len(order), 0.0
    for rank, i in enumerate(order):
        so_far = max(so_far, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[int(i)] = so_far
    return adjusted


def verdicts(
    differences: dict[str, Difference],
    smallest_effect: float,
    is_lower_better: bool,
    floor: float = 0.0,
    num_arms: int | None = None,
) -> dict[str, Verdict]:
    """Returns the verdict of each arm. floor: the effect of rounding; a smaller one is none. num_arms: how many were
    planned; those without a difference count in Holm's correction all the same. None: those that are given.

    better, worse: p below 5 % by Holm over the arms. equivalent: the interval lies within +-smallest_effect, tested by
    Holm as well. A difference that is sure and smaller than smallest_effect is equivalent, and said to be sure.
    """
    known = {name: one for name, one in differences.items() if one.p is not None}
    others = [1.0] * ((num_arms or len(known)) - len(known))
    p_different = dict(zip(known, holm([*(one.p or 0.0 for one in known.values()), *others]), strict=False))
    equal = [equivalence_p(one, smallest_effect) for one in known.values()]
    p_equal = dict(zip(known, holm([*equal, *others]), strict=False))
    found = {}
    for name, one in differences.items():
        if name not in known:
            found[name] = Verdict("undecided", None, "one run on each side: the seeds were not sampled")
        else:
            found[name] = verdict(one, p_different[name], p_equal[name], smallest_effect, is_lower_better, floor)
    return found


def verdict(
    one: Difference, p: float, p_equal: float, smallest_effect: float, is_lower_better: bool, floor: float
) -> Verdict:
    if one.error == 0 and one.mean == 0:
        return Verdict("equivalent", p, "there is no difference at all")
    if p_equal < ALPHA:
        sure = "; it is not 0" if p < ALPHA else ""
        return Verdict("equivalent", p, f"the difference is smaller than {smallest_effect:g}{sure}")
    if p < ALPHA and abs(one.mean) <= floor:
        return Verdict("undecided", p, f"the difference is not above that of rounding, {floor:g}")
    if p < ALPHA:
        is_better = (one.mean < 0) == is_lower_better
        alone = "; of the questions: the seeds were not sampled" if one.how == "questions" else ""
        is_open = one.low is not None and one.high is not None and min(abs(one.low), abs(one.high)) < smallest_effect
        size = f"; whether it is more than {smallest_effect:g} is open" if is_open else ""
        return Verdict("better" if is_better else "worse", p, f"{p_text(p)} by Holm{alone}{size}")
    needed = seeds_to_decide(one, smallest_effect)
    return Verdict("undecided", p, f"about {needed} seeds would decide" if needed else "more questions would decide")


def p_text(p: float) -> str:
    """Returns p = .. in words; far below a thousandth it rests on the tails of the distribution that was assumed."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def equivalence_p(one: Difference, smallest_effect: float) -> float:
    """Returns the p of equivalence, below 5 % exactly if the 95 % interval lies within +-smallest_effect."""
    assert one.error is not None
    room = smallest_effect - abs(one.mean)
    if one.error == 0:
        return float(room < 0)
    return min(1.0, float(2 * stats.t.sf(room / one.error, one.degrees)))


def power(
    effect: float,
    spread: float,
    num_seeds: int,
    alpha: float = ALPHA,
    question_error: float = 0.0,
    degrees: float | None = None,
) -> float:
    """Returns how often num_seeds pairs find an effect, by the noncentral t distribution.

    question_error, degrees: as in Difference, for scores; None: num_seeds - 1.
    """
    if num_seeds < 2:
        return 0.0
    error = (spread**2 / num_seeds + question_error**2) ** 0.5
    if error == 0:
        return float(effect != 0)
    degrees = num_seeds - 1 if degrees is None else degrees
    critical, shift = stats.t.ppf(1 - alpha / 2, degrees), abs(effect) / error
    found = float(stats.nct.sf(critical, degrees, shift) + stats.nct.cdf(-critical, degrees, shift))
    return 1.0 if np.isnan(found) else found  # scipy has no number for a shift far beyond the critical value


def detectable_effect(
    spread: float,
    num_seeds: int,
    share: float = 0.8,
    alpha: float = ALPHA,
    question_error: float = 0.0,
    degrees: float | None = None,
) -> float | None:
    """Returns the effect that num_seeds pairs find in `share` of all cases; None for fewer than two. The others as in
    `power`."""
    from scipy.optimize import brentq

    if num_seeds < 2:
        return None
    high = (spread**2 + question_error**2) ** 0.5
    if high == 0:
        return 0.0

    def gap(effect: float) -> float:
        return power(effect, spread, num_seeds, alpha, question_error, degrees) - share

    while gap(high) < 0:
        high *= 2
    return float(brentq(gap, 0.0, high))  # pyright: ignore[reportArgumentType]


def seeds_to_decide(one: Difference, smallest_effect: float) -> int | None:
    """Returns the number of seeds whose interval, at this spread, is half as wide as smallest_effect.

    Then a difference of 0 is equivalent and one of twice smallest_effect is found. None without a spread over seeds,
    and where the questions alone are too noisy.
    """
    if not one.spread or smallest_effect <= 0:
        return None
    errors = (one.spread**2 / np.arange(2, MAX_SEEDS + 1) + one.question_error**2) ** 0.5
    fitting = np.flatnonzero(quantiles() * errors <= smallest_effect)
    if not len(fitting):
        return None if one.question_error else MAX_SEEDS
    return max(int(fitting[0]) + 2, one.num_seeds + 1)


@functools.lru_cache(maxsize=1)
def quantiles() -> np.ndarray:
    """Returns Student's t at 97.5 % for 2 to MAX_SEEDS seeds."""
    return stats.t.ppf(1 - ALPHA / 2, np.arange(1, MAX_SEEDS))


def speed_up(difference: float, steps: ArrayLike, losses: ArrayLike) -> float | None:
    """Returns the per cent of its steps that the baseline would save (negative: need in addition) for a difference.

    difference: of the loss. steps, losses: the baseline's mean curve, whose slope at the end is that of a line through
    its last quarter. None if the loss does not fall there. It is a linear guess, and rankings flip while a learning
    rate decays (arXiv 2509.02046): read it at the end of finished runs only.
    """
    x, y = np.asarray(steps, float), np.asarray(losses, float)
    late = x >= x.max() - 0.25 * (x.max() - x.min())
    if late.sum() < 2:
        return None
    slope = float(np.polyfit(x[late], y[late], 1)[0])
    return None if slope >= 0 else 100 * difference / slope / float(x.max())
