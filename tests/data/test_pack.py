"""The packer as a user meets it: what is written, what is skipped, and what each mistake says."""

import json
from pathlib import Path

import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource

from oq2vl_jax.data.packing.packer import PackConfig, pack_shards
from oq2vl_jax.data.packing.rows import decode_row
from oq2vl_jax.data.samples.images import ImageError, check_image
from oq2vl_jax.data.samples.tars import read_members
from oq2vl_jax.errors import UserError
from oq2vl_jax.jobs import Execution
from oq2vl_jax.paths import expand_paths
from tests.data.conftest import caption_sample, conversation_sample, png


@pytest.fixture
def pack(tmp_path, byte_tokenizer_folder):
    def run(shards, out="packed", **overrides):
        settings = {"num_tokens": 96, "max_images": 3, "visual_tokens": 4, "template": "open_qwen2vl"}
        execution = Execution(num_workers=overrides.pop("num_workers", 1))
        config = PackConfig(
            str(shards), str(tmp_path / out), byte_tokenizer_folder, execution=execution, **settings | overrides
        )
        return pack_shards(config), tmp_path / out

    return run


def read_rows(out):
    manifest = json.loads((out / "manifest.json").read_text())
    source = ArrayRecordDataSource([str(out / entry["file"]) for entry in manifest["files"] if entry["rows"]])
    return [decode_row(source[i]) for i in range(len(source))]


def test_every_document_is_in_the_rows_with_its_own_image_bytes(tmp_path, write_shard, pack):
    samples = [caption_sample(i) for i in range(20)]
    manifest, out = pack(write_shard(tmp_path / "0.tar", samples))
    rows = read_rows(out)
    assert manifest["documents"] == manifest["images"] == 20
    assert manifest["rows"] == len(rows)
    packed = {key: image for row in rows for key, image in zip(row.keys, row.images, strict=True)}
    assert packed == {sample["__key__"]: sample["png"] for sample in samples}
    assert manifest["tokens"] == sum(len(row.tokens) for row in rows)
    assert manifest["token_fill"] == pytest.approx(manifest["tokens"] / (96 * len(rows)))
    assert all(len(row.tokens) <= 96 and len(row.images) <= 3 for row in rows)


def test_written_bytes_do_not_depend_on_the_number_of_workers(tmp_path, write_shard, pack):
    for shard in range(3):
        write_shard(tmp_path / f"{shard}.tar", [caption_sample(100 * shard + i) for i in range(10)])
    one, one_out = pack(tmp_path / "{0..2}.tar", "one", num_workers=1)
    two, two_out = pack(tmp_path / "{0..2}.tar", "two", num_workers=2)
    assert one == two
    for entry in one["files"]:
        assert (one_out / entry["file"]).read_bytes() == (two_out / entry["file"]).read_bytes()


def test_a_second_call_keeps_finished_shards_and_other_settings_are_refused(tmp_path, write_shard, pack):
    shard = write_shard(tmp_path / "0.tar", [caption_sample(i) for i in range(5)])
    first, out = pack(shard)
    written = (out / "rows-00000.array_record").stat().st_mtime_ns
    second, _ = pack(shard)
    assert first == second
    assert (out / "rows-00000.array_record").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="max_images: 3 there, 2 now"):
        pack(shard, max_images=2)


def test_single_bad_samples_are_counted_by_reason_and_the_rest_is_packed(tmp_path, write_shard, pack):
    jpeg = png(64, 64, image_format="JPEG")
    samples = [
        caption_sample(0),
        caption_sample(1, image=png(1, 1)),
        caption_sample(2, image=jpeg[: len(jpeg) // 2]),
        caption_sample(3, image=b"no picture at all"),
        caption_sample(4, text="x" * 200),
        {"__key__": "000005", "png": png()},
        {"__key__": "000006", "txt": b"no image"},
        {"__key__": "000007", "png": png(), "json": b"{"},
        conversation_sample(8, question="<image><image>\nTwo?"),
        conversation_sample(9, question="<image>" * 4 + "\nFour?", images=4),
        conversation_sample(10),
        {"__key__": "000011", "png": png(), "txt": b"\xff\xfe"},
    ]
    manifest, out = pack(write_shard(tmp_path / "0.tar", samples))
    assert manifest["skipped"] == {
        "more_markers_than_images": 1, "image_missing": 1, "image_too_small": 1, "image_undecodable": 2,
        "json_invalid": 1, "text_missing": 1, "text_not_utf8": 1, "too_many_images": 1, "too_many_tokens": 1,
    }  # fmt: skip
    assert manifest["samples"] == 12 == manifest["documents"] + sum(manifest["skipped"].values())
    assert {key for row in read_rows(out) for key in row.keys} == {"000000", "000010"}


def test_a_hundred_megapixels_are_refused_from_the_header():
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(buffer, "PNG")
    with pytest.raises(ImageError, match="10,000 x 10,000 pixels"):
        check_image(buffer.getvalue())


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_image_of_any_format_is_found(image_format):
    data = png(200, 150, image_format=image_format)
    check_image(data)
    with pytest.raises(ImageError, match="damaged"):
        check_image(data[: int(len(data) * 0.7)])


@pytest.mark.parametrize("cut", [0.5, 0.7])
def test_a_tar_cut_off_in_the_middle_stops_the_packer_or_is_counted(tmp_path, write_shard, pack, cut):
    shard = Path(write_shard(tmp_path / "0.tar", [caption_sample(i) for i in range(10)]))
    shard.write_bytes(shard.read_bytes()[: int(shard.stat().st_size * cut)])
    with pytest.raises(UserError, match=r"0\.tar: the tar is broken or cut off after \d+ whole samples"):
        pack(shard)
    manifest, _ = pack(shard, "kept", broken_shards="keep")
    assert manifest["skipped"]["shard_cut_off"] == 1
    assert 0 < manifest["documents"] < 10


def test_a_tar_cut_exactly_between_two_members_is_noticed(tmp_path, write_shard):
    shard = Path(write_shard(tmp_path / "0.tar", [caption_sample(i) for i in range(4)]))
    data = shard.read_bytes()
    end_of_third = data.index(b"000003.png")
    shard.write_bytes(data[:end_of_third])
    with pytest.raises(UserError, match="end-of-archive mark is missing"):
        list(read_members(str(shard)))


@pytest.mark.parametrize("content", [b"", b"this is no tar" * 100])
def test_a_file_that_is_no_tar_is_named(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"0\.tar: the tar is broken"):
        list(read_members(str(tmp_path / "0.tar")))


def test_missing_shards_are_named(tmp_path, write_shard):
    write_shard(tmp_path / "0.tar", [])
    with pytest.raises(UserError, match=r"no file .*1\.tar and 1 more, of 3 expected"):
        expand_paths("--shards", str(tmp_path / "{0..2}.tar"))
    with pytest.raises(UserError, match="no file"):
        expand_paths("--shards", str(tmp_path / "nothing-*.tar"))


def test_nothing_to_pack_is_an_error_that_says_why(tmp_path, write_shard, pack):
    with pytest.raises(UserError, match=r"no sample could be packed.*image_missing"):
        pack(write_shard(tmp_path / "0.tar", [{"__key__": "0", "txt": b"x"}]))


@pytest.mark.parametrize(("field", "value"), [("visual_tokens", 5), ("num_tokens", 0), ("num_workers", 0)])
def test_impossible_settings_are_refused(tmp_path, write_shard, pack, field, value):
    with pytest.raises(UserError, match=field.replace("_", "-")):
        pack(write_shard(tmp_path / "0.tar", [caption_sample(0)]), **{field: value})


def test_formats_that_are_not_split_are_packed_together_and_others_one_by_one(tmp_path):
    from oq2vl_jax.data.packing.packer import PackConfig, list_inputs

    for name, content in (("a.tar", ""), ("b_packed.json", "{}"), ("c.json", "[{}]")):
        (tmp_path / name).write_text(content)
    files = [str(tmp_path / name) for name in ("a.tar", "b_packed.json", "c.json")]
    config = PackConfig("x", "out", "tokenizer")
    assert list_inputs(config, files[:2]) == (files[:2], 1)
    with pytest.raises(UserError, match="tars and instructions together; pack them one by one"):
        list_inputs(config, [files[0], files[2]])
