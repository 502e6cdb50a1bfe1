"""LLaVA-style instruction files: found entry by entry, packed like tars."""

import json

import numpy as np
import pytest

from oq2vl_jax.data.packing.packer import PackConfig, pack_shards
from oq2vl_jax.data.samples.formats import instructions
from oq2vl_jax.data.samples.formats.instructions import (
    entry_offsets,
    is_instructions,
    parse_entry,
    read_range,
    split_into_ranges,
)
from oq2vl_jax.errors import UserError
from oq2vl_jax.jobs import Execution
from tests.data.conftest import png


def conversation(*turns):
    return [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(turns)]


def make_entries(rng, count):
    texts = ("plain", "umlaut ä", "emoji 🌳 木", 'quote " and \\ and }', "]} {[", "\u2028 line", "", "nul \u0000")
    return [
        {"id": f"{i}", "conversations": conversation(texts[rng.integers(len(texts))] * int(rng.integers(1, 30)), "ok")}
        for i in range(count)
    ]


@pytest.mark.parametrize("block", [7, 64, 2**20])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("form", ["list", "indented", "lines"])
def test_every_entry_is_found_where_it_stands(tmp_path, monkeypatch, block, ascii_only, form):
    monkeypatch.setattr(instructions, "READ_BYTES", block)
    entries = make_entries(np.random.default_rng(block), 40)
    file = tmp_path / ("a.jsonl" if form == "lines" else "a.json")
    if form == "lines":
        file.write_text("".join(json.dumps(entry, ensure_ascii=ascii_only) + "\n" for entry in entries))
    else:
        file.write_text(json.dumps(entries, ensure_ascii=ascii_only, indent=2 if form == "indented" else None))
    offsets = entry_offsets(str(file))
    assert [json.loads(read_range(str(file), a, b)) for a, b in offsets.tolist()] == entries


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": 1}, {"id": 2', "entry 1, at byte 12, is not valid JSON or is cut off"),
        ('[{"id": 1}', "the list ends after 1 entries without its ]"),
        ('[{"id": 1}, 3]', "entry 1, at byte 12, is no JSON object"),
        ('[{"id": 1,}]', "entry 0, at byte 1, is not valid JSON"),
        ('[{"id": 1}][{"id": 2}]', "more follows the list that ends at byte 10"),
        ("", "is empty"),
        ("[]", "is empty"),
    ],
)
def test_a_broken_file_is_one_sentence_that_names_the_place(tmp_path, content, message):
    file = tmp_path / "a.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        split_into_ranges(str(file), 10)


@pytest.fixture
def folder(tmp_path):
    """Twelve entries: with one image, with two, with text alone, and with everything that can be wrong."""
    (tmp_path / "images" / "coco").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "images" / "coco" / f"{i}.png").write_bytes(png(seed=i))
    (tmp_path / "images" / "broken.png").write_bytes(b"no picture")
    entries = [
        {"id": "0", "image": "coco/0.png", "conversations": conversation("<image>\nWhat?", "A cat.", "Sure?", "Yes.")},
        {"id": "1", "image": ["coco/1.png", "coco/2.png"], "conversations": conversation("<image> or <image>?", "2nd")},
        {"id": "2", "conversations": conversation("Hi", "Hello.")},
        {"id": "3", "image": "coco/0.png", "conversations": conversation("What <image> is this?", "A cat.")},
        {"id": "4", "image": "coco/none.png", "conversations": conversation("<image>", "x")},
        {"id": "5", "image": "../secret.png", "conversations": conversation("<image>", "x")},
        {"id": "6", "image": "broken.png", "conversations": conversation("<image>", "x")},
        {"id": "7", "image": "coco/0.png", "conversations": conversation("no marker", "x")},
        {"id": "8", "conversations": conversation("Hi", "Hello.")[::-1]},
        {"id": "9", "image": 3, "conversations": conversation("<image>", "x")},
        {"id": "10", "image": "/etc/passwd", "conversations": conversation("<image>", "x")},
        {"id": "11"},
    ]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return tmp_path


def pack(folder, tokenizer, out="out", **options):
    config = PackConfig(
        str(folder / "data.json"), str(folder / out), tokenizer, 192, 4, 4, template="chatml",
        images=str(folder / "images"), execution=Execution(1), **{"unmarked_images": "skip"} | options,
    )  # fmt: skip
    return pack_shards(config)


def test_an_instruction_file_is_packed_and_everything_else_is_counted(folder, byte_tokenizer_folder):
    manifest = pack(folder, byte_tokenizer_folder)
    assert (manifest["samples"], manifest["documents"], manifest["images"]) == (12, 4, 4)
    assert manifest["skipped"] == {
        "conversation_invalid": 1, "conversation_starts_with_assistant": 1, "image_count_mismatch": 1,
        "image_invalid": 1, "image_missing": 1, "image_outside_folder": 2, "image_undecodable": 1,
    }  # fmt: skip


def test_tasks_of_few_entries_hold_the_same_documents_and_resume(folder, byte_tokenizer_folder):
    manifest = pack(folder, byte_tokenizer_folder, out="parts", entries_per_task=3)
    assert (manifest["samples"], manifest["documents"]) == (12, 4)
    assert len(manifest["files"]) == 4
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "parts").glob("*.array_record")}
    (folder / "parts" / "rows-00001.json").unlink()
    assert pack(folder, byte_tokenizer_folder, out="parts", entries_per_task=3) == manifest
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "parts").glob("*.array_record")}
    assert [name for name in sorted(before) if before[name] != after[name]] == ["rows-00001.array_record"]


def test_a_picture_without_a_marker_comes_first_and_is_noted(folder, byte_tokenizer_folder):
    manifest = pack(folder, byte_tokenizer_folder, unmarked_images="first")
    assert (manifest["documents"], manifest["images"]) == (5, 5)
    assert manifest["notes"]["image_without_marker"] == 1
    assert "image_count_mismatch" not in manifest["skipped"]


def test_an_option_of_another_format_is_refused(folder, byte_tokenizer_folder):
    with pytest.raises(UserError, match="--files-per-task does not apply to instructions"):
        pack(folder, byte_tokenizer_folder, files_per_task=3)


def test_a_replaced_picture_is_packed_again(folder, byte_tokenizer_folder):
    first = pack(folder, byte_tokenizer_folder, entries_per_task=3)
    (folder / "images" / "coco" / "1.png").write_bytes(png(seed=7))
    second = pack(folder, byte_tokenizer_folder, entries_per_task=3)
    changed = [a["file"] for a, b in zip(first["files"], second["files"], strict=True) if a["xxh3"] != b["xxh3"]]
    assert changed == ["rows-00000.array_record"]


def test_a_link_to_a_picture_elsewhere_is_followed_and_noted(folder, byte_tokenizer_folder):
    (folder / "elsewhere").mkdir()
    (folder / "images" / "coco" / "1.png").rename(folder / "elsewhere" / "1.png")
    (folder / "images" / "coco" / "1.png").symlink_to(folder / "elsewhere" / "1.png")
    manifest = pack(folder, byte_tokenizer_folder)
    assert manifest["images"] == 4
    assert manifest["notes"]["image_linked_from_outside"] == 1


def test_a_file_with_images_needs_their_folder(folder, byte_tokenizer_folder):
    config = PackConfig(str(folder / "data.json"), str(folder / "out"), byte_tokenizer_folder, execution=Execution(1))
    with pytest.raises(UserError, match=r"entry 0 names the image 'coco/0\.png'; give the folder.*--images"):
        pack_shards(config)


def test_lists_are_instructions_and_objects_are_packed_rows(folder, tmp_path):
    assert is_instructions(str(folder / "data.json"))
    (tmp_path / "row_packed.json").write_text('{"data": []}')
    assert not is_instructions(str(tmp_path / "row_packed.json"))
    assert not is_instructions("x.tar")


def test_an_entry_that_is_no_utf8_is_a_problem():
    assert parse_entry(b'{"id": "\xff"}', None).problem == "json_invalid"
