"""The MLM-Filter scorer: replies to integers, batched as one by one, parse failures counted."""

import dataclasses
import json

import jax
import numpy as np
import polars as pl
import pytest

from convert.checkpoint_stream import LazyArray, save_checkpoint
from oq2vl_jax.config import CheckpointDescription, DecoderConfig, ModelConfig, VisionConfig
from oq2vl_jax.curate.mlm_filter import (
    MLMFilterScorer,
    parse_published_score,
    parse_score,
    published_prompt,
    read_criteria,
)
from oq2vl_jax.curate.mlm_metrics import METRICS
from oq2vl_jax.curate.score import ScoreConfig, score_shards
from oq2vl_jax.data.samples.shards import Sample
from oq2vl_jax.data.text.codec import TextCodec
from oq2vl_jax.errors import UserError
from oq2vl_jax.generate.generator import Request
from oq2vl_jax.generate.reply import SamplingOptions
from oq2vl_jax.jobs import Execution
from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
from oq2vl_jax.trees import named_arrays
from tests.data.conftest import caption_sample, png

MODEL = ModelConfig(
    vision=VisionConfig(image_size=16, patch_size=8, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2),
    decoder=DecoderConfig(320, 32, 64, 1, 2, 1, 16),
    num_visual_tokens=4,
    image_token_id=268,
)
DIGITS, EOS = range(ord("0"), ord("9") + 1), 258


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, byte_tokenizer_folder):
    """Random weights whose head prefers digits and the end of a turn."""
    from pathlib import Path

    arrays = {name: np.array(x) for name, x in named_arrays(OpenQwen2VL(jax.random.key(6), MODEL)).items()}
    arrays["decoder.embed_tokens"][[*DIGITS]] *= 40
    arrays["decoder.embed_tokens"][EOS] *= 60
    arrays["decoder.layers.mlp.down_proj.kernel"] *= 30  # or a token would only repeat itself
    lazy = {name: LazyArray(x.shape, lambda x=x: x) for name, x in arrays.items()}
    out = tmp_path_factory.mktemp("mlm") / "checkpoint"
    save_checkpoint(out, lazy, CheckpointDescription(MODEL, "open_qwen2vl", "random"), Path(byte_tokenizer_folder))
    return str(out)


@pytest.mark.parametrize(
    ("reply", "score"),
    [("85", 85), (" 0", 0), ("100", 100), ("7.", 7), ("101", None), ("", None), ("-5", None), ("8/10", None),
     ("good", None), ("85 out", None), ("4.5", None), ("٣", None)],
)  # fmt: skip
def test_a_reply_is_an_integer_from_0_to_100_or_no_score(reply, score):
    assert parse_score(reply) == score


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("85,", 85),
        ("8;", 8),
        ("85\nas", 85),
        (" 7 ", 7),
        ("100", 100),
        ("101", None),
        ("85.", None),
        ("", None),
        ("-5", None),
    ],
)
def test_a_reply_as_the_published_filter_reads_it(reply, score):
    assert parse_published_score(reply) == score


def reference_prompt(tokenizer, text):
    """Theirs as transformers tokenises it: the conversation as one text, cut at the image."""
    conversation = (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|><|im_start|>user\n"
        f"<image>\n{text}<|im_end|><|im_start|>assistant\n"
    )
    before, after = (tokenizer(chunk).input_ids for chunk in conversation.split("<image>"))
    return [*[*before, None, *after][:2040], tokenizer(" ").input_ids[-1]]


def test_the_published_prompt_is_theirs_token_for_token(checkpoint, qwen_tokenizer_folder):
    from transformers import AutoTokenizer

    theirs, codec = (
        AutoTokenizer.from_pretrained(qwen_tokenizer_folder),
        TextCodec.from_transformers(qwen_tokenizer_folder),
    )
    rng, words = np.random.default_rng(0), ["a", " dog", "\n", "  ", "é", "你好", "85", ".", "\tx", " <b>", "'s"]
    for length in [0, 1, 5, 3000, *rng.integers(1, 200, 200)]:
        text = "".join(rng.choice(words, length)) + " Rate it."
        prompt = published_prompt(codec, text, num_visual_tokens=3)
        image = codec.special.image
        expected = [x for token in reference_prompt(theirs, text) for x in ([image] * 3 if token is None else [token])]
        assert prompt == expected


def test_the_published_profile_needs_its_criteria(checkpoint, tmp_path, write_shard):
    shard = write_shard(tmp_path / "0.tar", [caption_sample(0, text="a dog ")])
    config = ScoreConfig(shard, str(tmp_path / "out"), "mlm-filter", checkpoint, 4, profile="mlm_filter")
    with pytest.raises(UserError, match="needs --model mlm-filter and --criteria"):
        score_shards(config)
    criteria = tmp_path / "criteria.json"
    criteria.write_text(json.dumps({"semantic_understanding": "Text Caption: {caption}"}))
    metrics = ("semantic_understanding",)
    config = dataclasses.replace(config, criteria=str(criteria), metrics=metrics, execution=Execution(1))
    assert score_shards(config)["profile"] == "mlm_filter"
    scorer = MLMFilterScorer(checkpoint, 1, str(criteria), metrics, "mlm_filter")
    image, (prompt,) = scorer.prepare(Sample("", [png(20, 30, seed=0)], text="a dog "))
    assert prompt == published_prompt(scorer.generator.codec, "Text Caption: a dog ", MODEL.num_visual_tokens)
    reply = scorer.generator.generate([Request(prompt, [image])], SamplingOptions(2))[0].text
    assert scorer.score([(image, [prompt])]) == [{metrics[0]: parse_published_score(reply)}]


def test_batched_scores_are_those_asked_one_by_one(checkpoint, tmp_path):
    criteria = tmp_path / "criteria.json"  # short ones: every length of 32 tokens more is a program to compile
    criteria.write_text(json.dumps({metric: f"{metric[:i]} {{caption}}" for i, metric in enumerate(METRICS)}))
    scorer = MLMFilterScorer(checkpoint, batch_size=4, criteria=str(criteria), metrics=METRICS)
    samples = [Sample("", [png(20 + i, 30, seed=i)], text="word " * (i + 1)) for i in range(5)]
    prepared = [scorer.prepare(sample) for sample in samples]
    together = [row for start in (0, 4) for row in scorer.score(prepared[start : start + 4])]
    space = scorer.generator.codec.encode(" ")
    replies = []
    for (image, prompts), row in zip(prepared, together, strict=True):
        for metric, prompt in zip(METRICS, prompts, strict=True):
            assert prompt[-len(space) :] == space
            reply = scorer.generator.generate([Request(prompt, [image])], SamplingOptions(3))[0].text
            replies.append(reply)
            assert row[metric] == parse_score(reply)
    assert len({parse_score(reply) for reply in replies}) > 1, replies


def test_the_command_counts_replies_that_are_no_score(checkpoint, tmp_path, write_shard):
    shard = write_shard(tmp_path / "0.tar", [caption_sample(i, text=f"picture {i} <image>") for i in range(6)])
    metrics = ("semantic_understanding", "image_text_matching")
    criteria = tmp_path / "criteria.json"
    criteria.write_text(json.dumps(dict.fromkeys(metrics, "{caption}")))
    config = ScoreConfig(
        shard, str(tmp_path / "out"), "mlm-filter", checkpoint, 4, metrics, str(criteria), execution=Execution(1)
    )
    manifest = score_shards(config)
    frame = pl.read_parquet(tmp_path / "out" / "00000000.parquet")
    assert frame.columns == ["key", "uid", *metrics, "status"]
    assert manifest["unparsed"] == {metric: frame[metric].null_count() for metric in metrics}
    assert manifest["scored"] == 6
    with pytest.raises(UserError, match="other settings"):
        score_shards(dataclasses.replace(config, metrics=metrics[:1]))


def test_criteria_come_from_a_file_and_are_checked(tmp_path):
    file = tmp_path / "criteria.json"
    file.write_text('{"semantic_understanding": "Rate {caption}"}')
    assert read_criteria(str(file), ("semantic_understanding",)) == {"semantic_understanding": "Rate {caption}"}
    with pytest.raises(UserError, match=r"no text for the metric image_text_matching"):
        read_criteria(str(file), ("image_text_matching",))
    file.write_text('{"semantic_understanding": "Rate it"}')
    with pytest.raises(UserError, match=r"each with \{caption\} in it"):
        read_criteria(str(file), ("semantic_understanding",))
