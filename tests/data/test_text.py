import random

import numpy as np
import pytest
import tokenizers

from oq2vl_jax.data.samples.shards import Sample
from oq2vl_jax.data.text.codec import SampleError, TextCodec
from oq2vl_jax.errors import UserError

M = 3


@pytest.fixture(scope="module")
def codec(qwen_tokenizer_folder):
    return TextCodec.from_transformers(qwen_tokenizer_folder)


def conversation(*messages, images=1):
    turns = [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(messages)]
    return Sample("key", [b"image"] * images, conversations=turns)


def spell(codec, tokens):
    """Tokens as text with special tokens visible."""
    return codec._backend.decode(tokens, skip_special_tokens=False)


def test_special_tokens_have_the_published_ids(codec):
    assert codec.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert codec.special.bos == 128245, "<s> is already a BPE entry and keeps its id"
    assert codec.special.end_of_chunk == 151665
    assert codec.special.image == 151655
    assert codec.special.eos == 151645
    assert codec.special.pad == 151643


def test_caption_is_bos_image_newline_caption_eos_with_all_text_labelled(codec):
    document = codec.document(Sample("key", [b"image"], text=" a red bus \n"), "plain", M)
    assert spell(codec, document.tokens) == "<s>" + "<|image_pad|>" * M + "\na red bus<|im_end|>"
    assert document.is_labelled.tolist() == [True] + [False] * M + [True] * (len(document.tokens) - 1 - M)


def test_literal_image_marker_in_a_caption_is_no_image(codec):
    document = codec.document(Sample("key", [b"image"], text="<image> of a <image>"), "plain", M)
    assert (document.tokens == codec.special.image).sum() == M
    assert "<image-placeholder> of a <image-placeholder>" in spell(codec, document.tokens)


def test_text_that_spells_a_special_token_stays_text(codec):
    document = codec.document(conversation("<image>\nhi<|im_end|>", "no <|image_pad|>"), "chatml", M)
    assert (document.tokens == codec.special.image).sum() == M
    assert (document.tokens == codec.special.eos).sum() == 3  # system, user, assistant


def test_open_qwen2vl_template_is_the_published_one(codec):
    sample = conversation("<image>\nWhat is it?", "A bus.", "Sure?", "")
    document = codec.document(sample, "open_qwen2vl", M)
    image = "<|image_pad|>" * M
    assert spell(codec, document.tokens) == (
        "<s><|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{image}What is it?<|im_end|>assistant\nA bus.<|im_end|>\n"  # the newline after the image is dropped
        "<|im_start|>user\nSure?<|im_end|>assistant\n <|im_end|>\n"  # no newline before "assistant"; empty -> a space
    )
    assert spell(codec, document.tokens[document.is_labelled]) == "A bus.<|im_end|>\n <|im_end|>\n"


def test_released_template_puts_first_images_first_and_no_newline_before_an_answer(codec):
    sample = conversation("<image>\nWhat is it?", "A bus.", "And <image>?", "A car.", images=2)
    document = codec.document(sample, "open_qwen2vl_released", M)
    image = "<|image_pad|>" * M
    assert spell(codec, document.tokens) == (
        f"{image}\n<s><|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "\nWhat is it?<|im_end|>assistantA bus.<|im_end|>\n"
        f"<|im_start|>user\nAnd {image}?<|im_end|>assistantA car.<|im_end|>\n"
    )
    assert spell(codec, document.tokens[document.is_labelled]) == "A bus.<|im_end|>\nA car.<|im_end|>\n"


TURNS = ["<image>\nWhat is it?", "A bus.", "And <image> or <image>?", "", "Why?", "It has\nwheels."]


@pytest.mark.parametrize("template", ["open_qwen2vl", "open_qwen2vl_released", "chatml"])
def test_labelled_text_is_each_answer_turn_by_turn_and_nothing_else(codec, template):
    document = codec.document(conversation(*TURNS, images=3), template, M)
    starts = np.flatnonzero(np.diff(document.is_labelled.astype(int), prepend=0, append=0))
    turns = [spell(codec, document.tokens[a:b]) for a, b in starts.reshape(-1, 2)]
    end = "<|im_end|>" if template == "chatml" else "<|im_end|>\n"
    empty = "" if template == "chatml" else " "  # the published code writes a space for an empty message
    assert turns == [f"A bus.{end}", f"{empty}{end}", f"It has\nwheels.{end}"]


def test_a_system_message_takes_the_place_of_the_default(codec):
    prompt = spell(codec, codec.prompt(["Hi", "Hello.", "Bye"], "chatml", M, system="Be brief."))
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello."
        "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chatml_template_is_qwens_own_and_labels_answers_only(codec):
    document = codec.document(conversation("<image>\nWhat is it?", "A bus."), "chatml", M)
    image = "<|image_pad|>" * M
    assert spell(codec, document.tokens) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{image}\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA bus.<|im_end|>\n"
    )
    assert spell(codec, document.tokens[document.is_labelled]) == "A bus.<|im_end|>"


@pytest.mark.parametrize("template", ["plain", "open_qwen2vl", "open_qwen2vl_released", "chatml"])
def test_a_prompt_is_the_beginning_of_the_document_it_asks_for(codec, template):
    if template == "plain":
        document = codec.document(Sample("key", [b"image"], text="a red bus"), template, M)
        prompt = codec.prompt(["<image>\na"], template, M)
    else:
        document = codec.document(conversation("<image>\nWhat is it?", "A bus."), template, M)
        prompt = codec.prompt(["<image>\nWhat is it?"], template, M)
    assert prompt == document.tokens[: len(prompt)].tolist()


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (conversation("<image><image>\nWhat?", "A bus."), "image_count_mismatch"),
        (conversation("What?", "A bus."), "image_count_mismatch"),
        (conversation("<image>\nWhat?"), "conversation_invalid"),
        (Sample("key", [], conversations=[{"from": "gpt", "value": "hi"}] * 2), "conversation_starts_with_assistant"),
        (Sample("key", [], conversations=[{"from": "human", "value": "hi"}] * 2), "conversation_invalid"),
        (Sample("key", [], conversations=[{"from": "human", "value": 3}] * 2), "conversation_invalid"),
        (Sample("key", [b"image"], text="  \n"), "text_empty"),
        (Sample("key", [], problem="json_invalid"), "json_invalid"),
    ],
)
def test_samples_that_fit_no_template_say_why(codec, sample, reason):
    with pytest.raises(SampleError, match=reason):
        codec.document(sample, "open_qwen2vl", M)


def test_text_only_conversation_has_no_placeholder(codec):
    document = codec.document(conversation("Hi", "Hello.", images=0), "open_qwen2vl", M)
    assert not (document.tokens == codec.special.image).any()
    assert document.tokens.dtype == np.int32


def test_a_folder_without_a_tokenizer_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        TextCodec.from_transformers(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        TextCodec.from_transformers(str(tmp_path))


def published_ids(plain, special, turns, system):
    """Written out from the published code: the text of a conversation, blanks at its end removed, parted at <image>,
    each part tokenised with special tokens understood; where the first begins with <s>, every part loses its first
    token; <s> is put before all."""
    text = f"<s><|im_start|>system\n{system}<|im_end|>\n"
    for i, turn in enumerate(turns):
        turn = turn.strip()
        text += f"{turn or ' '}<|im_end|>\n" if i % 2 else f"<|im_start|>user\n{turn}<|im_end|>assistant\n"
    parts = [plain.encode(part, add_special_tokens=False).ids for part in text.rstrip().split("<image>")]
    ids = [special.bos, parts[0][0], *parts[0][1:]]
    for part in parts[1:]:
        ids += [special.image, *part[1:]]
    return ids


def test_the_published_form_of_a_prompt_has_their_ids(qwen_tokenizer_folder):
    codec, rng = TextCodec.from_transformers(qwen_tokenizer_folder), random.Random(0)
    plain = tokenizers.Tokenizer.from_str(codec._backend.to_str())
    plain.encode_special_tokens = False  # special tokens in the text are understood
    words = ("What", " is this", "?", "\n", "\n\n", " ", "<image>\n", "<image>", "Yes", "12", "café", "你好")
    for _ in range(300):
        turns = ["".join(rng.choices(words, k=rng.randrange(7))) for _ in range(2 * rng.randrange(3) + 1)]
        turns = [turn.replace("<image>", "") if i % 2 else turn for i, turn in enumerate(turns)]
        expected = published_ids(plain, codec.special, turns, "You are a helpful assistant.")
        assert codec.published_prompt(turns, 1) == expected


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        ("a cat", []), ("a <image> of a cat", ["image_marker_in_text"]),
        ("<|im_end|>", ["special_token_in_text"]), ("<s> <image>", ["image_marker_in_text", "special_token_in_text"]),
    ],
)  # fmt: skip
def test_text_that_spells_a_marker_or_a_special_token_is_noted(codec, text, notes):
    assert codec.text_notes(Sample("k", [], text=text)) == notes
    assert codec.text_notes(Sample("k", [b""], elements=["plain", None, text])) == notes
