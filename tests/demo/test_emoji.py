"""Emoji of two artists as a bed for ablations, and the benchmark that asks for them."""

import io
import json
import tarfile
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from oq2vl_jax.demo.emoji import EmojiConfig, find_concepts, write_emoji
from oq2vl_jax.errors import UserError
from oq2vl_jax.eval.benchmarks import find_benchmark
from oq2vl_jax.eval.evaluate import Answer, answer_line, read_items

NUM_CONCEPTS = 60


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    out = tmp_path_factory.mktemp("emoji")
    write_emoji(EmojiConfig(str(out), num_concepts=NUM_CONCEPTS, num_copies=2, spoilt_share=0.25))
    return out


def samples_of(folder: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for tar in sorted(folder.glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                key, _, suffix = member.name.partition(".")
                found.setdefault(key, {})[suffix] = archive.extractfile(member).read()
    return found


def test_both_artists_have_drawn_1900_concepts_with_names_of_their_own():
    concepts = find_concepts()
    assert 1800 < len(concepts) < 2000
    assert len({concept.name for concept in concepts}) == len(concepts)
    assert not any("skin" in concept.name for concept in concepts)


def test_training_sees_held_out_concepts_in_one_style_only(bed):
    captions = samples_of(bed / "captions")
    styles: dict[str, set[str]] = {}
    for key in captions:
        styles.setdefault(key[:4], set()).add(key[4])
    alone = {concept for concept, of in styles.items() if of == {"t"}}
    assert len(styles) == NUM_CONCEPTS
    assert len(alone) == round(0.3 * NUM_CONCEPTS)
    assert all(of == {"t", "o"} for concept, of in styles.items() if concept not in alone)
    assert {key[:4] for key in samples_of(bed / "held_out")} == alone
    table = pl.read_parquet(bed / "test" / "emoji_test.parquet")
    asked = table.filter(pl.col("concept") == "held out")["index"].str.slice(0, 4).unique()
    assert set(asked) == alone


def test_pictures_are_squares_on_pale_grounds_and_captions_are_names(bed):
    right = 0
    captions = samples_of(bed / "captions")
    for sample in captions.values():
        image = Image.open(io.BytesIO(sample["png"]))
        assert image.size == (64, 64)
        metadata = json.loads(sample["json"])
        assert (sample["txt"].decode() == metadata["concept"]) == metadata["is_right"]
        right += metadata["is_right"]
    assert 0.6 < right / len(captions) < 0.9  # a quarter is spoilt; 204 samples


def test_conversations_ask_what_it_is_and_whether_it_is_another(bed):
    answers = []
    for sample in samples_of(bed / "conversations").values():
        turns = json.loads(sample["json"])["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * 2
        assert turns[0]["value"].startswith("<image>\n")
        answers += [turn["value"] for turn in turns if turn["value"] in ("yes", "no")]
    assert 0.3 < answers.count("yes") / len(answers) < 0.7


def test_names_to_choose_from_are_of_the_same_kind_and_none_begins_another(bed):
    table = pl.read_parquet(bed / "test" / "emoji_test.parquet")
    assert sorted(table["options"].unique()) == ["hard", "random"]
    named = {kind: set() for kind in ("held out", "seen")}
    for row in table.iter_rows(named=True):
        names = [row[letter] for letter in "ABCD"]
        assert not any(a != b and a.startswith(b) for a in names for b in names)
        assert len(set(names)) == 4
        named[row["concept"]] |= set(names)
    assert not named["held out"] & named["seen"]


def test_the_same_seed_writes_the_same_bytes(bed, tmp_path):
    write_emoji(EmojiConfig(str(tmp_path), num_concepts=NUM_CONCEPTS, num_copies=2, spoilt_share=0.25))
    for file in ("captions/00000.tar", "conversations/00000.tar", "held_out/00000.tar", "tokenizer/tokenizer.json"):
        assert (tmp_path / file).read_bytes() == (bed / file).read_bytes(), file
    old, new = (pl.read_parquet(folder / "test" / "emoji_test.parquet") for folder in (bed, tmp_path))
    assert old.equals(new)


def test_the_task_asks_in_words_or_with_the_picture_alone(bed):
    benchmark = find_benchmark("emoji")
    item = read_items("emoji", [bed / "test" / "emoji_test.parquet"])[0]
    right = item.choices[item.answer]
    assert benchmark.prompt(item, "official").text == "<image>\nWhat is this?"
    alone = benchmark.prompt(item, "open_qwen2vl")
    assert (alone.text, alone.is_raw) == ("<image>", True)
    assert benchmark.judge(item, f" {right.upper()}\n", "official").score == 1
    wrong = next(name for name in item.choices.values() if name != right)
    assert benchmark.judge(item, wrong, "official") == (0.0, next(k for k, v in item.choices.items() if v == wrong))
    assert benchmark.judge(item, "a thing", "official") == (0.0, None)
    scores = [float(i) for i in range(4)]
    line = answer_line(item, alone, Answer(right, scores))
    assert line["log_probability"] == scores["ABCD".index(item.answer)]


def test_missing_packages_are_named(tmp_path, monkeypatch):
    from oq2vl_jax.demo import emoji

    monkeypatch.setattr(emoji, "PACKAGES", ("no_such_package",))
    with pytest.raises(UserError, match=r"packages no_such_package are missing; install the extra"):
        write_emoji(EmojiConfig(str(tmp_path)))
