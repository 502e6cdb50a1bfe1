"""Parquet files that are odd or damaged: read, counted by reason, or refused in a sentence."""

import base64
import json
import random
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from pyarrow import parquet

from oq2vl_jax.curate.filter.expression import Leaf
from oq2vl_jax.curate.filter.pool import read_pool
from oq2vl_jax.curate.filter.rules import make_rule
from oq2vl_jax.curate.fingerprints import Fingerprint, Index
from oq2vl_jax.data.inspect import InspectCommand, inspect
from oq2vl_jax.data.packing.packed import PackedRows
from oq2vl_jax.data.packing.rows import decode_row
from oq2vl_jax.data.samples.columns import find_columns
from oq2vl_jax.data.samples.formats import parquet as parquet_format
from oq2vl_jax.data.samples.formats.format import Reading
from oq2vl_jax.data.samples.ids import parse_uid
from oq2vl_jax.data.samples.uids import UidSet
from oq2vl_jax.errors import UserError
from tests.data.conftest import png, tar_of
from tests.data.test_parquet import STRUCT, conversations, pack, write_parquet

TALK = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([("image", pa.string()), ("jpg", pa.binary()), ("txt", pa.string())], ("jpg", "txt", None, "caption")),
        ([("images", pa.list_(pa.string())), ("image", STRUCT), ("conversations", TALK)],
         ("image", "conversations", None, "conversation")),
        ([("image", pa.dictionary(pa.int32(), pa.binary())), ("text", pa.dictionary(pa.int32(), pa.string()))],
         ("image", "text", None, "caption")),
        ([("image", pa.large_binary()), ("text", pa.large_string())], ("image", "text", None, "caption")),
        ([("image", pa.binary_view()), ("text", pa.string_view())], ("image", "text", None, "caption")),
        ([("images", pa.list_(STRUCT, 2)), ("texts", pa.large_list(pa.string()))],
         ("images", "texts", None, "document")),
        ([("images", pa.null()), ("messages", TALK), ("id", pa.int64())], (None, "messages", "id", "conversation")),
        ([("conversations", pa.list_(pa.string())), ("image", STRUCT), ("text", pa.string())],
         ("image", "text", None, "caption")),
        ([("uid", pa.string()), ("id", pa.string()), ("image", STRUCT), ("caption", pa.string())],
         ("image", "caption", "uid", "caption")),
        ([("id", pa.bool_()), ("index", pa.int64()), ("image", STRUCT), ("caption", pa.string())],
         ("image", "caption", "index", "caption")),
    ],
)  # fmt: skip
def test_columns_are_chosen_by_their_types(fields, expected):
    assert find_columns("x", pa.schema(fields)) == expected


@pytest.mark.parametrize(
    ("fields", "told", "words"),
    [
        ([("images", pa.list_(pa.list_(STRUCT))), ("messages", TALK)], (), "column images is list.*and no picture"),
        (
            [("image", STRUCT), ("captions", pa.list_(pa.string()))],
            (),
            "--columns image=image text=captions may be meant",
        ),
        ([("file_name", pa.string()), ("caption", pa.string())], (), "No columns here make a sample"),
        ([("uid", pa.string()), ("url", pa.string()), ("text", pa.string())], (), "No columns here make a sample"),
        ([("image", STRUCT), ("text", pa.string()), ("text", pa.string())], (), "two columns are called text"),
        ([("a", STRUCT), ("b", pa.string()), ("c", pa.string())], ("text=b", "caption=c"), "text is told twice"),
        (
            [("image", STRUCT), ("text", pa.string()), ("n", pa.bool_())],
            ("id=n",),
            "n is bool, and no name of a sample",
        ),
    ],
)
def test_columns_that_make_no_sample_are_a_sentence(fields, told, words):
    with pytest.raises(UserError, match=words):
        find_columns("x", pa.schema(fields), told)


@pytest.mark.parametrize("column", [None, "uid", "key", "id", "index"])
def test_filter_and_packer_know_a_sample_by_the_same_id(column, tmp_path):
    """Names of every kind: a digest, numbers short and long, signs, null."""
    names = ["a-1", f"{7:032x}", "12", "1234567890123456789", "+5", "00012", None, "ä", "a+" * 16]
    table = {"image": [png()] * len(names), "caption": ["a cat"] * len(names)}
    if column == "index":
        names = [i if i != 3 else None for i in range(len(names))]
    if column is not None:
        table[column] = names
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    uids = [parse_uid(sample.uid) for sample in parquet_format.read(str(tmp_path / "a.parquet"), Reading())]
    pool = read_pool([str(tmp_path / "a.parquet")], [], [make_rule(Leaf("words", ">= 1"))])
    assert pool.is_valid.tolist() == [uid is not None for uid in uids]
    found = [(int(high), int(low)) for high, low in zip(pool.high, pool.low, strict=True)]
    assert [one for one, uid in zip(found, uids, strict=True) if uid] == [uid for uid in uids if uid]
    assert sum(uid is None for uid in uids) == {None: 0, "uid": 8, "index": 1}.get(column, 1)


def test_files_whose_rows_would_share_ids_are_not_chosen_from(tmp_path, byte_tokenizer_folder):
    for part in "ab":
        (tmp_path / part / "data").mkdir(parents=True)
        table = pa.table({"image": [png(), png()], "caption": [f"one {part}", f"two {part}"]})
        parquet.write_table(table, tmp_path / part / "data" / "0.parquet")
    UidSet([], []).save(str(tmp_path / "none.npy"))
    pattern = str(tmp_path / "*" / "data" / "0.parquet")
    with pytest.raises(UserError, match="ids would be too"):
        pack(pattern, tmp_path, byte_tokenizer_folder, without_uids=str(tmp_path / "none.npy"))
    with pytest.raises(UserError, match="ids would be too"):
        read_pool(sorted(str(p) for p in tmp_path.glob("*/data/0.parquet")), [], [make_rule(Leaf("words", ">= 1"))])
    assert pack(pattern, tmp_path, byte_tokenizer_folder)["documents"] == 4


def test_entries_without_an_id_have_none(tmp_path, byte_tokenizer_folder):
    entries = [{"conversations": conversations(f"q {i}", "a")} | ({"id": None} if i % 2 else {}) for i in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    UidSet([1], [2]).save(str(tmp_path / "some.npy"))
    unwanted = pack(str(tmp_path / "a.json"), tmp_path, byte_tokenizer_folder, without_uids=str(tmp_path / "some.npy"))
    assert unwanted["documents"] == 4


def test_text_that_is_not_utf8_is_counted(tmp_path, byte_tokenizer_folder):
    good, bad = ["a cat"], pa.array([b"a\xff", b"ok"]).cast(pa.binary())
    captions = pa.Array.from_buffers(pa.string(), 2, bad.buffers())
    table = pa.table({"image": [png(), png(seed=1)], "caption": captions})
    parquet.write_table(table, tmp_path / "a.parquet")
    manifest = pack(str(tmp_path / "a.parquet"), tmp_path, byte_tokenizer_folder)
    assert (manifest["documents"], manifest["skipped"]) == (len(good), {"text_not_utf8": 1})
    assert parquet_format.read_one(str(tmp_path / "a.parquet"), 0, 0, Reading()).problem == "text_not_utf8"


def test_damage_at_random_ends_in_a_sentence_or_is_counted(tmp_path):
    whole = Path(write_parquet(tmp_path, "conversations")).read_bytes()
    rng, file, said = random.Random(0), tmp_path / "damaged.parquet", 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 3, 40))):
            content[rng.choice((rng.randrange(len(content)), -rng.randrange(1, 2000)))] = rng.randrange(256)
        file.write_bytes(content)
        parquet_format.columns_of.cache_clear()
        try:
            for path in parquet_format.split(str(file), 1):
                list(parquet_format.read(path, Reading(str(tmp_path / "images"))))
        except UserError:
            said += 1
    assert said > 20


def test_a_replaced_picture_of_a_struct_without_bytes_is_packed_again(tmp_path, byte_tokenizer_folder):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "p.png").write_bytes(png(seed=1))
    cells = pa.array([{"bytes": None, "path": "p.png"}, {"bytes": png(seed=5), "path": "gone.png"}], STRUCT)
    parquet.write_table(pa.table({"image": cells, "caption": ["one", "two"]}), tmp_path / "a.parquet")
    for seed in (1, 2):
        (tmp_path / "images" / "p.png").write_bytes(png(seed=seed))
        pack(str(tmp_path / "a.parquet"), tmp_path, byte_tokenizer_folder)
        held = {image for row in PackedRows(str(tmp_path / "packed")) for image in decode_row(row).images}
        assert held == {png(seed=seed), png(seed=5)}


def test_data_urls_of_a_column_are_read_and_others_named_shortly(tmp_path, byte_tokenizer_folder):
    url = "data:image/png;base64," + base64.b64encode(png(seed=3)).decode()
    cells = [url, "data:image/png,x", "data:image/png;base64,???", "http://a/b.png"]
    parquet.write_table(pa.table({"image": cells, "caption": ["a"] * 4}), tmp_path / "a.parquet")
    manifest = pack(str(tmp_path / "a.parquet"), tmp_path, byte_tokenizer_folder)
    assert (manifest["documents"], manifest["skipped"]) == (1, {"image_is_a_url": 2, "image_undecodable": 1})
    parquet.write_table(pa.table({"image": ["x" * 9999], "caption": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError) as raised:
        list(parquet_format.read(str(tmp_path / "b.parquet"), Reading()))
    assert len(str(raised.value)) < 400


def test_odd_names_of_files(tmp_path, byte_tokenizer_folder):
    for name in ("hash#bytes=0-1.parquet", "l_\udcff.parquet"):
        parquet.write_table(pa.table({"image": [png()], "caption": ["a"]}), str(tmp_path / "a.parquet"))
        (tmp_path / "a.parquet").rename(tmp_path / name)
        (tmp_path / "out").mkdir(exist_ok=True)
        folder = tmp_path / "out" / str(len(name))
        folder.mkdir()
        assert pack(str(tmp_path / name), folder, byte_tokenizer_folder)["documents"] == 1


def test_pictures_in_messages_are_inspected_and_surrogates_have_a_language(tmp_path, byte_tokenizer_folder):
    url = {"url": "data:image/png;base64," + base64.b64encode(png(seed=3)).decode()}
    content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "what?"}]
    talks = [[{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]] * 2
    lines = [json.dumps({"id": str(i), "messages": talk}) for i, talk in enumerate(talks)]
    lines.append(
        '{"id": "9", "messages": [{"role": "user", "content": "q \\ud800"}, {"role": "assistant", "content": "a"}]}'
    )
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    command = InspectCommand((str(tmp_path / "a.jsonl"),), str(tmp_path / "p.html"), tokenizer=byte_tokenizer_folder,
                             visual_tokens=4, template="chatml", num_workers=1, image_size=28)  # fmt: skip
    line = inspect(command)
    assert "0.67 pictures" in line
    assert "50.0% of the pictures occurred before" in line
    assert "33.3% would be skipped" in line


def test_the_number_of_samples_of_tars_is_not_guessed_from_their_beginnings(tmp_path, byte_tokenizer_folder):
    members = [(f"{i}.{kind}", data) for i in range(60) for kind, data in (("png", png()), ("txt", b"a cat"))]
    command = InspectCommand((str(tar_of(tmp_path / "0.tar", members)),), str(tmp_path / "p.html"), num_samples=20,
                             tokenizer=byte_tokenizer_folder, visual_tokens=4, num_workers=1)  # fmt: skip
    assert inspect(command).startswith("at least 20 samples in all, 20 read")


def test_pictures_that_benchmarks_share_are_found_in_each():
    index = Index([Fingerprint(5, (0b1111,)), Fingerprint(6, (0b1110,)), Fingerprint(5, (0b1111,)), Fingerprint(9, ())])
    found = index.find(Fingerprint(5, (0b1111,)), 2)
    assert [tuple(match) for match in found] == [(0, -1), (2, -1), (1, 1)]
    assert index.find(Fingerprint(7, (2**63,)), 2) == []
    assert np.uint64(2**64 - 1) == Fingerprint(2**64 - 1, ()).exact


def test_ids_of_categorical_names(tmp_path):
    frame = pl.DataFrame({"id": ["x", "y"], "image": [png(), png()], "caption": ["a", "b"]})
    frame.with_columns(pl.col("id").cast(pl.Categorical)).write_parquet(tmp_path / "a.parquet")
    uids = [parse_uid(sample.uid) for sample in parquet_format.read(str(tmp_path / "a.parquet"), Reading())]
    pool = read_pool([str(tmp_path / "a.parquet")], [], [make_rule(Leaf("characters", ">= 1"))])
    assert list(zip(pool.high.tolist(), pool.low.tolist(), strict=True)) == uids
