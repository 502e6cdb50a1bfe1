"""Conversations in every form become the same turns; what cannot be is counted by reason."""

import base64

import pytest

from oq2vl_jax.data.samples.chats import with_turns
from oq2vl_jax.data.samples.shards import Sample
from tests.data.conftest import png

A, B = png(seed=1), png(seed=2)
LLAVA = [
    {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "And <image>?"}, {"from": "gpt", "value": "A dog."},
]  # fmt: skip
FORMS = {
    "llava": LLAVA,
    "other speakers": [m | {"from": {"human": "user", "gpt": "assistant"}[m["from"]]} for m in LLAVA],
    "messages": [{"role": {"human": "user", "gpt": "assistant"}[m["from"]], "content": m["value"]} for m in LLAVA],
    "parts": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "And "}, {"type": "image", "index": 1}, {"type": "text", "text": "?"}],
        },
        {"role": "assistant", "content": "A dog."},
    ],
    "texts": [
        {"user": "<image>\nWhat?", "assistant": "A cat."},
        {"user": "And <image>?", "assistant": "A dog.", "source": "x"},
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_turns(form):
    sample = with_turns(Sample("k", [A, B], conversations=FORMS[form]))
    assert (sample.problem, sample.conversations, sample.images, sample.notes) == (None, LLAVA, [A, B], ())


def test_a_data_url_is_a_picture_and_an_index_chooses_one():
    url = "data:image/png;base64," + base64.b64encode(B).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image", "index": 0},
        {"type": "text", "text": "?"},
    ]
    sample = with_turns(
        Sample("k", [A], conversations=[{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}])
    )
    assert sample.images == [B, A]
    assert sample.conversations[0]["value"] == "<image>\n<image>\n?"


def test_pictures_without_a_place_come_first_and_are_noted_or_counted_out():
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    sample = with_turns(Sample("k", [A, B], conversations=talk, notes=("x",)))
    assert sample.conversations[0]["value"] == "<image>\n<image>\nWhat?"
    assert (sample.images, sample.notes) == ([A, B], ("x", "image_without_marker"))
    assert with_turns(Sample("k", [A], conversations=talk), places_unmarked=False).problem == "image_count_mismatch"


def test_a_last_question_without_an_answer_goes_with_its_pictures():
    sample = with_turns(Sample("k", [A, B], conversations=LLAVA[:3]))
    assert (sample.problem, sample.conversations, sample.images) == (None, LLAVA[:2], [A])
    assert sample.notes == ("last_question_unanswered",)


def human(content):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]


@pytest.mark.parametrize(
    ("images", "talk", "reason"),
    [
        ([A], "What?", "conversation_invalid"),
        ([A], ["What?"], "conversation_invalid"),
        ([A], [{"role": "tool", "content": "x"}], "conversation_invalid"),
        ([A], human(3), "conversation_invalid"),
        ([A], human("<image> <image>"), "more_markers_than_images"),
        ([A], human([{"type": "image", "index": 1}]), "more_markers_than_images"),
        ([A], human([{"type": "image", "index": "0"}]), "more_markers_than_images"),
        ([A, B], human("<image>"), "image_count_mismatch"),
        ([], human([{"type": "video"}]), "message_part_unknown"),
        ([], human([{"type": "image_url", "image_url": "https://x/y.png"}]), "image_is_a_url"),
        ([], human([{"type": "image_url", "image_url": "data:image/png;base64,!"}]), "image_undecodable"),
        ([A], [{"from": "gpt", "value": "x"}], "image_count_mismatch"),
    ],
)
def test_what_cannot_be_used_is_counted_by_reason(images, talk, reason):
    assert with_turns(Sample("k", images, conversations=talk)).problem == reason
