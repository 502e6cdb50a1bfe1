"""Packing while training: every sample once an epoch, within the budgets, restored exactly."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from oq2vl_jax.config import DataConfig, OnlineConfig
from oq2vl_jax.data.loading.online import OnlineLoader, SampleSource, online_fingerprint, prepare_tokenizer
from oq2vl_jax.data.samples.formats.format import Reading
from oq2vl_jax.data.samples.tars import read_members
from oq2vl_jax.errors import UserError
from tests.data.conftest import conversation_sample, png
from tests.data.test_instructions import conversation
from tests.train.conftest import TINY

NUM_ENTRIES = 50


@pytest.fixture
def folder(tmp_path):
    """An instruction file of conversations with 0 to 2 images and one broken picture."""
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / "images" / f"{i}.png").write_bytes(png(seed=i) if i < 3 else b"no picture")
    rng = np.random.default_rng(0)
    entries = []
    for i in range(NUM_ENTRIES):
        images = [f"{(i + k) % 3}.png" for k in range(i % 3)]
        text = "".join("<image>\n" for _ in images) + f"question {i} " + "x" * int(rng.integers(1, 60))
        entries.append({"id": f"{i}", "image": images, "conversations": conversation(text, f"answer {i}")})
    entries[7] = {"id": "7", "image": "3.png", "conversations": conversation("<image>", "x")}
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return tmp_path


@pytest.fixture
def make_loader(folder, byte_tokenizer_folder):
    def make(window=16, **changes):
        data = DataConfig(
            sources=(str(folder / "data.json"),), num_tokens=256, max_images=4, template="chatml", num_threads=2,
            kind="online", online=OnlineConfig(str(folder / "images"), byte_tokenizer_folder, window),
        )  # fmt: skip
        data = dataclasses.replace(data, **changes)
        return OnlineLoader(data, TINY.model, 2, 7, prepare_tokenizer(data, folder / "tokenizer"))

    return make


def answers_of(batch):
    """The numbers of the questions in a batch, read back from the tokens."""
    text = "".join(chr(token) if token < 256 else " " for row in batch.tokens for token in row.tolist())
    return [int(part.split()[0]) for part in text.split("question ")[1:]]


def test_rows_keep_the_budgets_and_hold_every_document_once_an_epoch(make_loader):
    loader = make_loader(window=49)
    seen = []
    while len(seen) < NUM_ENTRIES - 1:
        batch = next(loader)
        seen += answers_of(batch)
        assert batch.images.shape == (2, 4, 32, 32, 3)
        for row in range(2):
            placeholders = int((batch.tokens[row] == 268).sum())
            assert placeholders % 4 == 0
            shown = batch.images[row].reshape(4, -1).any(axis=1)
            assert shown.sum() == placeholders // 4
    assert sorted(seen[: NUM_ENTRIES - 1]) == [i for i in range(NUM_ENTRIES) if i != 7]
    assert set(loader.skipped) == {"image_undecodable"}
    loader.close()


@pytest.mark.parametrize("num_batches", [0, 1, 2, 5, 9])
def test_state_restores_the_batches_exactly(make_loader, num_batches):
    loader = make_loader()
    for _ in range(num_batches):
        next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    expected = [next(loader) for _ in range(6)]
    loader.close()
    restored = make_loader(num_threads=4)
    restored.set_state(state)
    for batch in expected:
        for ours, theirs in zip(next(restored), batch, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    restored.close()


def test_samples_of_a_tar_are_the_ones_the_packer_reads(tmp_path, write_shard):
    tar = write_shard(tmp_path / "a.tar", [conversation_sample(i, images=1 + i % 2) for i in range(9)])
    source = SampleSource((tar,), Reading())
    expected = list(read_members(tar))
    assert len(source) == 9
    for i in (8, 0, 4):
        assert source[i].key == expected[i].key
        assert source[i].images == [data for name, data in expected[i].files.items() if name.endswith("jpg")]


def test_the_fingerprint_depends_on_the_tokenizer(folder, byte_tokenizer_folder, tmp_path):
    data = DataConfig(64, 4, kind="online", sources=(str(folder / "data.json"),))
    other = tmp_path / "tokenizer"
    shutil.copytree(byte_tokenizer_folder, other)
    first = online_fingerprint(data, other)
    assert first == online_fingerprint(data, Path(byte_tokenizer_folder))
    file = other / "tokenizer.json"
    values = json.loads(file.read_text())
    values["added_tokens"][-1]["content"] += "!"
    file.write_text(json.dumps(values))
    assert online_fingerprint(data, other) != first


def test_a_mistake_in_the_sources_is_one_sentence(make_loader, folder, write_shard, byte_tokenizer_folder):
    with pytest.raises(UserError, match="no file nowhere"):
        make_loader(sources=("nowhere/*.json",))
    (folder / "cut.tar").write_bytes((folder / "images" / "0.png").read_bytes())
    with pytest.raises(UserError, match="the tar is compressed, broken or cut off"):
        make_loader(sources=(str(folder / "cut.tar"),))
    with pytest.raises(UserError, match="give the folder of the images with --images"):
        next(make_loader(online=OnlineConfig(None, byte_tokenizer_folder)))


def test_sources_without_a_usable_sample_end_with_a_sentence(make_loader, folder, monkeypatch):
    from oq2vl_jax.data.loading import online

    monkeypatch.setattr(online, "MAX_SKIPPED_IN_A_ROW", 100)
    entries = [{"id": f"{i}", "image": "3.png", "conversations": conversation("<image>", "x")} for i in range(5)]
    (folder / "bad.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"100 samples in a row could not be used: {'image_undecodable'"):
        next(make_loader(sources=(str(folder / "bad.json"),)))
