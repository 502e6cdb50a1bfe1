"""Parquet with the pictures inside: the same rows as other layouts, resumed, and what is wrong with a file."""

import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from oq2vl_jax.data.packing.packed import PackedRows
from oq2vl_jax.data.packing.packer import PackConfig, pack_shards
from oq2vl_jax.data.packing.rows import decode_row
from oq2vl_jax.data.samples.formats import parquet as parquet_format
from oq2vl_jax.data.samples.formats.format import Reading
from oq2vl_jax.errors import UserError
from oq2vl_jax.jobs import Execution
from tests.data.conftest import png

COUNT = 24
PICTURES = [[png(seed=10 * i + j) for j in range(i % 3)] for i in range(COUNT)]
TURNS = [("<image>\n" * len(images) + f"what {i}?", f"answer {i}") for i, images in enumerate(PICTURES)]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def conversations(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def messages(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def parts(question, answer):
    text = {"type": "text", "text": question.replace("<image>\n", ""), "index": None}
    images = [{"type": "image", "text": None, "index": i} for i in range(question.count("<image>"))]
    return [
        {"role": "user", "content": [*images, text]},
        {"role": "assistant", "content": [{"type": "text", "text": answer, "index": None}]},
    ]


def texts(question, answer):
    return [{"user": question, "assistant": answer, "source": "made"}]


LAYOUTS = {
    "conversations": ("conversations", conversations, "struct"),
    "messages": ("messages", messages, "bytes"),
    "parts": ("messages", parts, "struct"),
    "texts": ("texts", texts, "path"),
}


def write_parquet(folder, layout, row_group_size=7):
    column, form, kind = LAYOUTS[layout]
    (folder / "images").mkdir(exist_ok=True)
    cells = []
    for i, images in enumerate(PICTURES):
        for j, data in enumerate(images):
            (folder / "images" / f"{i}-{j}.png").write_bytes(data)
        cells.append(
            [
                {"struct": {"bytes": data, "path": None}, "bytes": data, "path": f"{i}-{j}.png"}[kind]
                for j, data in enumerate(images)
            ]
        )
    types = {"struct": STRUCT, "bytes": pa.binary(), "path": pa.string()}
    table = pa.table(
        {
            "id": [str(i) for i in range(COUNT)],
            "images": pa.array(cells, pa.list_(types[kind])),
            column: [form(*turns) for turns in TURNS],
        }
    )
    parquet.write_table(table, folder / "data.parquet", row_group_size=row_group_size)
    return str(folder / "data.parquet")


def write_json(folder):
    (folder / "images").mkdir(exist_ok=True)
    entries = []
    for i, images in enumerate(PICTURES):
        for j, data in enumerate(images):
            (folder / "images" / f"{i}-{j}.png").write_bytes(data)
        names = [f"{i}-{j}.png" for j in range(len(images))]
        entries.append({"id": str(i), "image": names, "conversations": conversations(*TURNS[i])})
    (folder / "data.json").write_text(json.dumps(entries))
    return str(folder / "data.json")


def pack(path, folder, tokenizer, **options):
    config = PackConfig(
        path, str(folder / "packed"), tokenizer, 192, 4, 4, template="chatml", images=str(folder / "images"),
        execution=Execution(1), **options,
    )  # fmt: skip
    return pack_shards(config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_packs_to_the_same_rows_as_a_list_in_json(layout, tmp_path, byte_tokenizer_folder):
    folders = tmp_path / "json", tmp_path / "parquet"
    for folder in folders:
        folder.mkdir()
    pack(write_json(folders[0]), folders[0], byte_tokenizer_folder)
    manifest = pack(write_parquet(folders[1], layout, COUNT), folders[1], byte_tokenizer_folder)
    assert (manifest["samples"], manifest["documents"], manifest["skipped"]) == (COUNT, COUNT, {})
    rows = [(folder / "packed" / "rows-00000.array_record").read_bytes() for folder in folders]
    assert rows[0] == rows[1]


def test_a_row_group_is_a_task_and_is_packed_again_alone(tmp_path, byte_tokenizer_folder):
    path = write_parquet(tmp_path, "conversations")
    manifest = pack(path, tmp_path, byte_tokenizer_folder)
    assert len(manifest["files"]) == 4
    keys = [key for row in PackedRows(str(tmp_path / "packed")) for key in decode_row(row).keys]
    assert sorted(keys, key=int) == [str(i) for i in range(COUNT)]
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "packed").glob("*.array_record")}
    (tmp_path / "packed" / "rows-00002.json").unlink()
    assert pack(path, tmp_path, byte_tokenizer_folder) == manifest
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "packed").glob("*.array_record")}
    assert [name for name in sorted(before) if before[name] != after[name]] == ["rows-00002.array_record"]


def test_captions_and_cells_that_cannot_be_used(tmp_path, byte_tokenizer_folder):
    cells = [{"bytes": png(), "path": None}, {"bytes": None, "path": None}, {"bytes": b"x", "path": None},
             {"bytes": None, "path": "https://x/y.png"}, None, {"bytes": png(), "path": None}]  # fmt: skip
    captions = ["a cat", "b", "c", "d", "e", None]
    table = pa.table({"image": pa.array(cells, STRUCT), "caption": captions})
    parquet.write_table(table, tmp_path / "data.parquet")
    manifest = pack(str(tmp_path / "data.parquet"), tmp_path, byte_tokenizer_folder)
    assert (manifest["samples"], manifest["documents"]) == (6, 1)
    assert manifest["skipped"] == {
        "image_is_a_url": 1, "image_missing": 2, "image_undecodable": 1, "text_missing": 1,
    }  # fmt: skip
    assert decode_row(PackedRows(str(tmp_path / "packed"))[0]).keys == [f"{tmp_path.name}/data.parquet#0"]


def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path, byte_tokenizer_folder):
    file = tmp_path / "data.parquet"
    parquet.write_table(pa.table({"picture": [b"x"], "label": ["y"]}), file)
    with pytest.raises(
        UserError,
        match=r"its columns are picture \(binary\), label \(string\); looked for a text in .*"
        r"--columns image=picture text=label may be meant",
    ):
        pack(str(file), tmp_path, byte_tokenizer_folder)
    file.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"data\.parquet: no whole parquet file"):
        pack(str(file), tmp_path, byte_tokenizer_folder)
    write_parquet(tmp_path, "conversations")
    content = bytearray(file.read_bytes())
    content[40:4000] = bytes(3960)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"data\.parquet: row group 0 cannot be read"):
        pack(str(file), tmp_path, byte_tokenizer_folder)


def test_columns_are_told_by_name(tmp_path, byte_tokenizer_folder):
    table = pa.table(
        {"n": [1, 2], "picture": [png(seed=1), png(seed=2)], "label": ["a cat", "a dog"], "name": ["x", "y"]}
    )
    parquet.write_table(table, tmp_path / "data.parquet")
    told = ("image=picture", "text=label", "id=name")
    pack(str(tmp_path / "data.parquet"), tmp_path, byte_tokenizer_folder, columns=told)
    assert sorted(key for row in PackedRows(str(tmp_path / "packed")) for key in decode_row(row).keys) == ["x", "y"]


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (("picture",), "expected image=COLUMN, text=COLUMN or id=COLUMN"),
        (("image=pictures",), "has no column pictures"),
        (("image=n", "text=label"), "image=n: n is int64, and no picture"),
        (("image=picture", "text=n"), "text=n: n is int64, and no text"),
    ],
)
def test_columns_that_do_not_fit_are_one_sentence(told, words, tmp_path, byte_tokenizer_folder):
    parquet.write_table(pa.table({"n": [1], "picture": [png()], "label": ["a"]}), tmp_path / "data.parquet")
    with pytest.raises(UserError, match=words):
        pack(str(tmp_path / "data.parquet"), tmp_path, byte_tokenizer_folder, columns=told)


def test_columns_of_a_tar_and_a_file_without_rows_are_refused(tmp_path, byte_tokenizer_folder):
    parquet.write_table(pa.table({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}),
                        tmp_path / "data.parquet")  # fmt: skip
    with pytest.raises(UserError, match=r"holds no rows|no sample could be packed"):
        pack(str(tmp_path / "data.parquet"), tmp_path, byte_tokenizer_folder)
    (tmp_path / "data.tar").write_bytes(bytes(1024))
    with pytest.raises(UserError, match="--columns does not apply to tars"):
        pack(str(tmp_path / "data.tar"), tmp_path, byte_tokenizer_folder, columns=("image=a",))


def test_a_conversation_kept_as_json_is_read(tmp_path, byte_tokenizer_folder):
    talks = [json.dumps(conversations("<image>\nwhat?", "this")), "[broken"]
    parquet.write_table(pa.table({"image": [png()] * 2, "conversations": talks}), tmp_path / "data.parquet")
    manifest = pack(str(tmp_path / "data.parquet"), tmp_path, byte_tokenizer_folder)
    assert (manifest["documents"], manifest["skipped"]) == (1, {"json_invalid": 1})


def test_a_replaced_picture_of_the_folder_is_packed_again(tmp_path, byte_tokenizer_folder):
    path = write_parquet(tmp_path, "texts")
    pack(path, tmp_path, byte_tokenizer_folder)
    (tmp_path / "images" / "1-0.png").write_bytes(png(seed=99))
    pack(path, tmp_path, byte_tokenizer_folder)
    held = [image for row in PackedRows(str(tmp_path / "packed")) for image in decode_row(row).images]
    assert png(seed=99) in held
    assert PICTURES[1][0] not in held


def test_rows_are_read_at_random_as_in_order(tmp_path):
    path, reading = write_parquet(tmp_path, "conversations"), Reading()
    spans = parquet_format.offsets(path)
    assert len(spans) == COUNT
    in_order = list(parquet_format.read(path, reading))
    order = np.random.default_rng(0).permutation(COUNT)
    assert [parquet_format.read_one(path, *spans[i].tolist(), reading) for i in order] == [in_order[i] for i in order]
