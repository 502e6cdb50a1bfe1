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
from oq2vl_jax.demo.report import Prediction, accuracy, question_only_accuracy, read_predictions
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
