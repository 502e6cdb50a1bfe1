"""What the demo reads off easy-VQA, and what its report counts."""

import json
from collections import defaultdict

import easy_vqa
import pytest

from oq2vl_jax.demo.easy_vqa import (
    QUESTIONS_PER_CONVERSATION,
    caption,
    group_by_image,
    named_by_yes_or_no,
    question_samples,
)
from oq2vl_jax.demo.report import (
    SEED_ACCURACIES,
    Prediction,
    accuracy,
    expected_of_a_run,
    interval_of_questions,
    last_line,
    question_only_accuracy,
    read_predictions,
    surprise,
)
from oq2vl_jax.errors import UserError


def test_a_caption_names_both_or_is_not_written():
    assert (
        caption([("what is the blue shape?", "rectangle"), ("what color is the shape?", "blue")]) == "a blue rectangle"
    )
    assert caption([("is there not a circle?", "no"), ("is there a red shape?", "yes")]) == "a red circle"
    assert caption([("is there a circle?", "no"), ("what color is the shape?", "blue")]) is None


@pytest.mark.parametrize(
    ("question", "answer", "named"),
    [
        ("is there a teal shape?", "yes", "teal"),
        ("is there a teal shape?", "no", None),
        ("is no teal shape present?", "no", "teal"),
        ("does the image not contain a teal shape?", "yes", None),
    ],
)
def test_yes_and_no_are_read_with_their_negation(question, answer, named):
    assert named_by_yes_or_no([(question, answer)], ("red", "teal")) == named


def test_every_training_question_is_asked_of_every_quarter_turn():
    questions, answers, ids = easy_vqa.get_train_questions()
    turns = {image_id: pairs for image_id, pairs in group_by_image(questions, answers, ids).items() if image_id < 3}
    samples = list(question_samples(easy_vqa.get_train_image_paths(), turns, seed=0))
    asked = defaultdict(list)
    for sample in samples:
        metadata = json.loads(sample["json"])
        messages = [message["value"].removeprefix("<image>\n") for message in metadata["conversations"]]
        assert len(messages) <= 2 * QUESTIONS_PER_CONVERSATION
        asked[sample["__key__"][:7]] += zip(messages[::2], messages[1::2], strict=True)
        assert sum("<image>" in message["value"] for message in metadata["conversations"]) == 1
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    assert len(asked) == 3 * 4
    for key, pairs in asked.items():
        assert sorted(pairs) == sorted(turns[int(key[:6])])


def test_accuracy_counts_exact_replies():
    replies = [("circle", "circle"), ("circle", "Circle"), ("yes", "no"), ("yes", "yes it is")]
    assert accuracy([Prediction("", "", answer, reply) for answer, reply in replies]) == 50.0


def test_question_only_guessing_reaches_the_published_67_percent():
    triples = zip(*easy_vqa.get_test_questions(), strict=True)
    predictions = [Prediction("", question, answer, "") for question, answer, _ in triples]
    assert len(predictions) == 9673
    assert round(question_only_accuracy(predictions), 1) == 67.0


def test_missing_predictions_are_one_sentence():
    with pytest.raises(UserError, match=r"no such file; python -m oq2vl_jax\.eval"):
        read_predictions("nowhere.jsonl", "pictures")


def answered(num_right, num_wrong, per_picture=1):
    """Predictions, some of them right, each picture asked `per_picture` times."""
    replies = ["red"] * num_right + ["blue"] * num_wrong
    return [Prediction(f"{i // per_picture}.png", "what color?", "red", reply) for i, reply in enumerate(replies)]


def test_the_last_line_has_an_interval_and_what_other_seeds_gave():
    line = last_line(answered(960, 40), 67.0)
    low, high = interval_of_questions(answered(960, 40))
    assert line.startswith(
        f"easy-VQA test accuracy: 96.0 % [{low:.1f}, {high:.1f}] (question-only: 67.0 %; 5 seeds gave "
    )
    assert 94.5 < low < 96 < high < 97.5
    wide = interval_of_questions(answered(960, 40, per_picture=10))
    assert wide[1] - wide[0] > 2 * (high - low)  # ten questions of a picture are right or wrong together here


def test_an_accuracy_that_the_seeds_do_not_let_expect_is_called_one():
    low, _ = expected_of_a_run()
    assert low < min(SEED_ACCURACIES.values())
    assert surprise(answered(995, 5)) is None
    assert "outside of what 5 seeds let expect" in surprise(answered(int(low) - 2, 102 - int(low)))
