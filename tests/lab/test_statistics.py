"""The statistics against scipy, and by simulation: how often a verdict is wrong, and how often it finds an effect."""

import numpy as np
import pytest
from scipy import stats

from oq2vl_jax.lab import statistics
from oq2vl_jax.lab.statistics import Difference, crossed, p_text, paired, verdicts, welch

NUM_SIMULATED = 2000
FALSE_POSITIVES = (0.03, 0.07)


def test_paired_is_students_t():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6))
    found, theirs = paired(a, b), stats.ttest_rel(a, b)
    interval = theirs.confidence_interval()
    assert (found.mean, found.low, found.high, found.p) == pytest.approx(
        (np.mean(a - b), interval.low, interval.high, theirs.pvalue), rel=1e-12
    )
    assert found.correlation == pytest.approx(np.corrcoef(a, b)[0, 1])
    flips = stats.permutation_test((a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf)
    assert found.sign_flip_p == pytest.approx(flips.pvalue)


def test_welch_is_scipys():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=5), rng.normal(1, 3, size=8)
    found, theirs = welch(a, b), stats.ttest_ind(a, b, equal_var=False)
    interval = theirs.confidence_interval()
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, theirs.pvalue), rel=1e-12)


def test_holm_and_mcnemar_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([]) == []
    a, b = [1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1, 0]
    assert statistics.mcnemar(a, b) == pytest.approx(stats.binomtest(5, 6).pvalue)
    assert statistics.mcnemar(a, a) == 1.0


def test_a_comparison_with_itself_is_exactly_nothing():
    values, scores = [0.3, 0.1, 0.2], np.random.default_rng(0).integers(0, 2, (3, 50))
    for one in (paired(values, values), crossed(scores, scores)):
        assert (one.mean, one.low, one.high, one.p, one.sign_flip_p) == (0, 0, 0, 1, 1)
        assert verdicts({"a": one}, 0.01, is_lower_better=True)["a"].word == "equivalent"


def wrong_verdicts(draw, num_seeds, seed):
    """The share of simulated comparisons that are called better or worse."""
    rng = np.random.default_rng(seed)
    words = [
        verdicts({"arm": draw(rng, num_seeds)}, 1e-9, is_lower_better=True)["arm"].word for _ in range(NUM_SIMULATED)
    ]
    return sum(word in ("better", "worse") for word in words) / NUM_SIMULATED


def continuous(rng, num_seeds, effect=0.0):
    shared = rng.normal(size=num_seeds)
    return paired(effect + shared + 0.3 * rng.normal(size=num_seeds), shared + 0.3 * rng.normal(size=num_seeds))


def unpaired(rng, num_seeds):
    return welch(rng.normal(size=num_seeds), 2 * rng.normal(size=num_seeds + 2))


def accuracy(rng, num_seeds, effect=0.0, num_questions=200, per_cluster=1, of_seed=0.15, of_question=0.5):
    """Right or wrong answers: a question is hard, harder for one arm, and a seed is lucky; pictures have questions."""
    hard = rng.normal(size=num_questions // per_cluster).repeat(per_cluster)
    scores = []
    for shift in (effect, 0.0):
        by_arm = of_question * rng.normal(size=num_questions // per_cluster).repeat(per_cluster)
        lucky = of_seed * rng.normal(size=(num_seeds, 1))
        scores.append(rng.normal(size=(num_seeds, num_questions)) < hard + by_arm + lucky + shift)
    return crossed(*scores, clusters=np.arange(num_questions) // per_cluster)


@pytest.mark.parametrize("num_seeds", [3, 5, 10])
@pytest.mark.parametrize("draw", [continuous, unpaired, accuracy], ids=lambda draw: draw.__name__)
def test_without_an_effect_one_in_twenty_is_called_different(draw, num_seeds):
    share = wrong_verdicts(draw, num_seeds, seed=num_seeds)
    print(f"{draw.__name__}, {num_seeds} seeds: {share:.2%}")
    low, high = FALSE_POSITIVES
    assert low <= share <= high


@pytest.mark.parametrize("num_seeds", [3, 10])
def test_questions_of_one_picture_count_as_one(num_seeds):
    def clustered(rng, num_seeds):
        return accuracy(rng, num_seeds, per_cluster=5, num_questions=400)

    share = wrong_verdicts(clustered, num_seeds, seed=num_seeds)
    print(f"clustered, {num_seeds} seeds: {share:.2%}")
    assert share <= 0.07


@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_the_effect_called_detectable_is_found_in_four_of_five(num_seeds):
    spread = 0.3 * 2**0.5
    effect = statistics.detectable_effect(spread, num_seeds)
    rng = np.random.default_rng(num_seeds)
    found = sum(
        verdicts({"arm": continuous(rng, num_seeds, -effect)}, 1e-9, is_lower_better=True)["arm"].word == "better"
        for _ in range(NUM_SIMULATED)
    ) / NUM_SIMULATED  # fmt: skip
    print(f"{num_seeds} seeds: {effect:.3f} found in {found:.1%}")
    assert 0.75 <= found <= 0.85


def difference(mean, spread, number=5):
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=number)
    drawn = (drawn - drawn.mean()) / drawn.std(ddof=1)
    return paired(mean + spread * drawn, np.zeros(number))


@pytest.mark.parametrize(
    ("mean", "spread", "word"),
    [(-1.0, 0.1, "better"), (1.0, 0.1, "worse"), (0.01, 0.02, "equivalent"), (0.1, 1.0, "undecided"),
     (0.05, 0.001, "equivalent")],
)  # fmt: skip
def test_words(mean, spread, word):
    one = difference(mean, spread)
    found = verdicts({"arm": one}, 0.1, is_lower_better=True)["arm"]
    assert found.word == word
    is_inside = one.low > -0.1 and one.high < 0.1
    assert (word == "equivalent") == is_inside
    flipped = verdicts({"arm": one}, 0.1, is_lower_better=False)["arm"]
    assert flipped.word == {"better": "worse", "worse": "better"}.get(word, word)


def test_more_arms_need_more_evidence_and_rounding_is_no_effect():
    one = difference(-1.0, 0.75)  # p = 0.04
    assert 0.025 < one.p < 0.05
    assert verdicts({"a": one}, 0.1, is_lower_better=True)["a"].word == "better"
    two = verdicts({"a": one, "b": difference(0.1, 1.0)}, 0.1, is_lower_better=True)
    assert [two[name].word for name in "ab"] == ["undecided", "undecided"]
    assert "seeds would decide" in two["a"].why
    assert verdicts({"a": one}, 0.1, is_lower_better=True, floor=2.0)["a"].word == "undecided"


def test_a_difference_that_is_sure_may_be_smaller_than_what_matters():
    one = paired([1.1, 1.12, 1.08, 1.11], [1.0, 1.0, 1.0, 1.0])
    found = {size: verdicts({"a": one}, size, is_lower_better=False)["a"] for size in (0.05, 0.1)}
    assert {size: one.word for size, one in found.items()} == {0.05: "better", 0.1: "better"}
    assert found[0.1].why.endswith("by Holm; whether it is more than 0.1 is open")
    assert found[0.05].why.endswith("by Holm")
    assert p_text(9.4e-4) == "p < 0.001"
    assert p_text(0.0312) == "p = 0.031"


def test_pictures_with_more_questions_do_not_widen_the_interval_by_that_alone():
    """One run of 99 % over pictures with 2 to 18 questions, against 2,000 resamples of the pictures."""
    rng = np.random.default_rng(3)
    sizes = rng.integers(2, 19, 1000)
    clusters = np.repeat(np.arange(1000), sizes)
    scores = (rng.random(len(clusters)) < 0.99).astype(float)
    right, means = np.bincount(clusters, scores), []
    for _ in range(2000):
        drawn = rng.integers(0, 1000, 1000)
        means.append(right[drawn].sum() / sizes[drawn].sum())
    found = crossed([scores], [np.zeros_like(scores)], clusters.tolist())
    assert found.mean == pytest.approx(scores.mean())
    assert found.error == pytest.approx(np.std(means), rel=0.1)


def test_one_seed_is_said_to_be_one():
    assert verdicts({"a": paired([1.0], [2.0])}, 0.1, is_lower_better=True)["a"].why.endswith("not sampled")
    rng = np.random.default_rng(0)
    one = crossed(rng.random((1, 300)) < 0.9, rng.random((1, 300)) < 0.5)
    assert one.how == "questions"
    found = verdicts({"a": one}, 0.01, is_lower_better=False)["a"]
    assert found.word == "better"
    assert "seeds were not sampled" in found.why


def test_the_number_of_seeds_that_would_decide_does():
    one = difference(0.0, 1.0)
    number = statistics.seeds_to_decide(one, 0.5)
    again = difference(0.0, 1.0, number)
    assert again.high <= 0.5 < difference(0.0, 1.0, number - 2).high


def test_speed_up_is_the_difference_over_the_slope():
    steps = np.arange(0, 1001, 50)
    losses = 3 - 0.001 * steps
    assert statistics.speed_up(-0.1, steps, losses) == pytest.approx(10.0)
    assert statistics.speed_up(-0.1, steps, np.ones_like(losses)) is None


def test_the_types_are_whole():
    assert isinstance(paired([1.0, 2.0], [1.0, 3.0]), Difference)


def test_scores_of_noisy_questions_are_promised_no_more_than_they_find():
    """Questions vary much, seeds little: more seeds would not help, and the promise has the questions in it."""
    rng, num_seeds, num_questions = np.random.default_rng(3), 5, 300

    def simulated(effect):
        questions, seeds = rng.normal(0, 1, (1, num_questions)), rng.normal(0, 0.02, (num_seeds, 1))
        scores = effect + questions + seeds + rng.normal(0, 0.5, (num_seeds, num_questions))
        return crossed(scores, np.zeros_like(scores))

    one = simulated(0.0)
    assert one.question_error > 0.9 * one.error
    promised = [
        statistics.detectable_effect(d.spread, num_seeds, question_error=d.question_error, degrees=d.degrees)
        for d in (simulated(0.0) for _ in range(20))
    ]
    effect = float(np.median(promised))
    found = np.mean([simulated(effect).p < 0.05 for _ in range(400)])
    print(f"{effect:.3f} found in {found:.1%}")
    assert 0.7 <= found <= 0.9
    assert statistics.seeds_to_decide(one, 0.05) is None
    assert "more questions" in verdicts({"arm": one}, 0.05, is_lower_better=False)["arm"].why


def test_an_arm_that_was_planned_counts_although_it_has_no_difference_yet():
    one = difference(0.1, 0.09)
    assert one.p is not None
    assert one.p < 0.1
    alone = verdicts({"a": one}, 0.001, is_lower_better=True)["a"]
    of_four = verdicts({"a": one}, 0.001, is_lower_better=True, num_arms=4)["a"]
    assert of_four.p == pytest.approx(4 * alone.p)


def test_power_of_an_effect_far_beyond_the_noise_is_1():
    assert statistics.power(1e3, 1e-3, 2) == 1.0
    assert statistics.detectable_effect(0.01, 2) is not None
