"""Tars that lie, strays, byte order marks, pictures that are something else: read, or counted by a true reason."""

import io
import json
import os
import resource
import tarfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image, ImageDraw

from oq2vl_jax import paths
from oq2vl_jax.curate.reshard import ReshardConfig, reshard
from oq2vl_jax.data.loading.online import SampleSource
from oq2vl_jax.data.packing.documents import read_documents
from oq2vl_jax.data.samples import images, tars
from oq2vl_jax.data.samples.formats import instructions
from oq2vl_jax.data.samples.ids import mixed, parse_uid, uid_of_key
from oq2vl_jax.data.samples.images import ImageError, check_image, decode_image
from oq2vl_jax.data.samples.tars import CutOffError, read_members
from oq2vl_jax.data.samples.uids import UidSet
from oq2vl_jax.errors import UserError
from tests.data.conftest import LIMITS, caption_members, encoded, tar_of

STRAYS = ("README", "._000001.txt", ".DS_Store", "folder/._x.png")


def with_strays():
    """Three captions, each with a stray between its files, some before and behind."""
    members = [(STRAYS[0], b"x")]
    for i in range(3):
        picture, text = caption_members(i)
        members += [picture, (STRAYS[i + 1], b"x"), (STRAYS[0], b"y"), text]
    return [*members, (STRAYS[2], b"z")]


def test_members_of_no_sample_part_no_sample_and_are_counted(tmp_path, codec):
    shard = tar_of(tmp_path / "0.tar", with_strays())
    documents, counts = read_documents([shard], codec, LIMITS, "stop")
    assert [document.key for document in documents] == ["000000", "000001", "000002"]
    assert counts["skipped"] == {"name_without_suffix": 8}
    assert counts["samples"] == len(documents) + 8


def test_resharding_reads_the_same_samples(tmp_path):
    shard = tar_of(tmp_path / "0.tar", with_strays())
    ids = [parse_uid(uid_of_key(f"{i:06d}")) for i in range(3)]
    UidSet(*zip(*ids, strict=True)).save(str(tmp_path / "uids.npy"))
    manifest = reshard(ReshardConfig(shard, str(tmp_path / "uids.npy"), str(tmp_path / "out")))
    assert manifest["written"] == 3
    with tarfile.open(tmp_path / "out" / "00000000.tar") as tar:
        names = tar.getnames()
    assert names == [f"{i:06d}.{suffix}" for i in range(3) for suffix in ("png", "txt")]


def test_packing_while_training_reads_the_same_samples(tmp_path):
    source = SampleSource((tar_of(tmp_path / "0.tar", with_strays()),), None)
    samples = [source[i] for i in range(len(source))]
    assert [sample.key for sample in samples if not sample.problem] == ["000000", "000001", "000002"]
    assert [sample.problem for sample in samples].count("name_without_suffix") == 8
    assert all(sample.problem or (sample.images and sample.text) for sample in samples)


def lying_tar(path, headers, lied_about=1):
    """A tar of three captions whose second picture has extended headers."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(3):
            for name, data in caption_members(i):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                if i == lied_about and name.endswith("png"):
                    info.pax_headers = headers
                tar.addfile(info, io.BytesIO(data))
    return str(path)


LIES = {
    "a size beyond every file": {"size": str(2**62)},
    "a size beyond every number": {"size": "9" * 60},
    "a size that is none": {"size": "many"},
    "a sparse map that is none": {"GNU.sparse.map": "0,x", "GNU.sparse.size": "10"},
    "a sparse version that is none": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "x"},
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_are_a_damaged_tar(lie, tmp_path, codec):
    shard = lying_tar(tmp_path / "0.tar", LIES[lie])
    try:
        documents, counts = read_documents([shard], codec, LIMITS, "keep")
    except CutOffError:
        pytest.fail("--broken-shards keep keeps what is whole")
    assert counts["samples"] + counts["skipped"].get("shard_cut_off", 0) == len(documents) + sum(
        counts["skipped"].values()
    )
    assert {document.key for document in documents} <= {"000000", "000001", "000002"}
    assert counts["samples"] + counts["skipped"].get("shard_cut_off", 0) >= 1


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_an_extended_header_of_8_gigabytes_takes_no_memory(kind, tmp_path):
    header = tarfile.TarInfo("lie")
    header.type, header.size = kind, 8 * 2**30 - 1
    content = header.tobuf(tarfile.USTAR_FORMAT) + Path(tar_of(tmp_path / "whole.tar", caption_members(0))).read_bytes()
    (tmp_path / "0.tar").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CutOffError, match="the tar is broken or cut off after 0 whole"):
        list(read_members(str(tmp_path / "0.tar")))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_sample_too_large_to_hold_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_SAMPLE_BYTES", 1000)
    members = [(f"000000.{i}.png", bytes(400)) for i in range(5)] + [("000001.txt", b"small")]
    first, second = read_members(tar_of(tmp_path / "0.tar", members))
    assert (first.problem, first.files) == ("sample_too_large", {})
    assert second.files == {"txt": b"small"}


def test_byte_order_marks_are_no_part_of_the_data(tmp_path, codec):
    shard = tar_of(tmp_path / "0.tar", caption_members(0, txt="\ufeffa red square".encode()))
    ((document,), _) = read_documents([shard], codec, LIMITS, "stop")
    assert "\ufeff" not in codec.decode(document.tokens.tolist())
    entry = {"id": "1", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    for name, text in (("list.jsonl", json.dumps(entry)), ("list.json", json.dumps([entry]))):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert instructions.is_instructions(str(tmp_path / name))
        (sample,) = instructions.read_instructions(str(tmp_path / name), None)
        assert sample.conversations == entry["conversations"]
    (tmp_path / "rules.toml").write_bytes(b'\xef\xbb\xbfexpression = "basic"')
    assert paths.read_text(str(tmp_path / "rules.toml")).startswith("expression")


@pytest.mark.parametrize("image_format", ["GIF", "BMP", "TIFF", "WEBP", "PNG", "JPEG"])
def test_a_picture_is_what_it_holds_not_what_it_is_called(image_format, tmp_path, codec):
    data = encoded(Image.new("RGB", (20, 20), "red"), image_format)
    ((document,), _) = read_documents([tar_of(tmp_path / "0.tar", caption_members(0, png=data))], codec, LIMITS, "stop")
    assert document.images == [data]
    assert decode_image(data, 8)[4, 4].tolist()[0] > 240


def test_pictures_are_turned_and_put_on_white_as_they_are_seen():
    for orientation in range(1, 9):
        image, exif = Image.new("RGB", (60, 40), "white"), Image.Exif()
        ImageDraw.Draw(image).rectangle((0, 0, 60, 9), fill="red")  # the upper edge
        exif[0x0112] = orientation
        data = encoded(image, "JPEG", exif=exif, quality=95)
        assert ("image_to_be_turned" in check_image(data)) == (orientation != 1)
        edges = {"top": (1, 16), "bottom": (30, 16), "left": (16, 1), "right": (16, 30)}
        seen, stored = decode_image(data, 32, as_seen=True), decode_image(data, 32)
        red = {name for name, place in edges.items() if seen[place][1] < 100}
        expected = {1: "top", 2: "top", 3: "bottom", 4: "bottom", 5: "left", 6: "right", 7: "right", 8: "left"}
        assert red == {expected[orientation]}
        assert stored[edges["top"]][1] < 100, "as the published code reads it"
    letters = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    assert check_image(encoded(letters, "PNG")) == ["image_transparent"]
    assert decode_image(encoded(letters, "PNG"), 8, as_seen=True).min() == 255
    assert decode_image(encoded(letters, "PNG"), 8).max() == 0
    exif[0x0112] = 6
    upper_edge = ImageDraw.Draw(letters := Image.new("RGBA", (60, 40), (0, 0, 0, 0)))
    upper_edge.rectangle((0, 0, 60, 9), fill="red")
    both = decode_image(encoded(letters, "PNG", exif=exif), 32, as_seen=True)
    assert both[16, 30].tolist()[1] < 100 < both[1, 8].tolist()[1], "turned, although it was put on white"
    damaged = encoded(Image.new("RGB", (20, 20)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert check_image(damaged) == []


def test_a_jpeg_of_endless_scans_is_refused_before_it_is_decoded():
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG",
                   progressive=True)  # fmt: skip
    assert check_image(data) == []
    last = data.rindex(b"\xff\xda")
    with pytest.raises(ImageError, match="a JPEG of more than 100 scans"):
        check_image(data[:-2] + images.MAX_SCANS * data[last:-2] + data[-2:])


def test_an_endless_word_is_left_out_before_it_is_tokenised(tmp_path, codec):
    shard = tar_of(tmp_path / "0.tar", [*caption_members(0, txt=b"x" * 10_000_000), *caption_members(1)])
    documents, counts = read_documents([shard], codec, LIMITS, "stop")
    assert [document.key for document in documents] == ["000001"]
    assert counts["skipped"] == {"text_too_long": 1}


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(UserError, match=r"0\.tar is a pipe, expected a file"):
        list(read_members(str(tmp_path / "0.tar")))


def test_sizes_that_are_no_numbers_pass_no_rule(tmp_path):
    from tests.curate.filter.test_datacomp import run

    sizes = [float("nan"), 300.0, float("nan")]
    pl.DataFrame({"uid": [f"{i:032x}" for i in range(3)], "original_width": sizes, "original_height": sizes[::-1]}
                 ).write_parquet(tmp_path / "m.parquet")  # fmt: skip
    assert run(tmp_path, tmp_path, "short_side(>= 200) | aspect(<= 3)")[1] == {f"{1:032x}"}


def test_paths_in_a_bucket_are_refused_where_local_ones_are_expected():
    from convert.checkpoint_stream import check_is_free
    from oq2vl_jax.eval import eval_config
    from oq2vl_jax.generate import options

    evaluation = eval_config.EvalConfig("runs/a", "pope", "data", "s3://bucket/results")
    predictions = options.GenerateConfig("runs/a", requests="requests.jsonl", out="gs://bucket/predictions.jsonl")
    for check, config in (
        (eval_config.check, evaluation), (options.check, predictions), (check_is_free, Path("s3://bucket/export")),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"--out .*bucket.*: a local path is expected"):
            check(config)


def test_messages_end_in_one_full_stop():
    assert str(UserError("it ends. .".replace(" .", "."))) == "it ends."
    assert str(UserError("did you mean it?.")) == "did you mean it?"
    assert str(UserError("and so on...")) == "and so on..."


def test_a_tokenizer_is_what_its_tokenizer_json_says(tmp_path):
    import tokenizers

    from oq2vl_jax.data.text.bpe import BYTE_RANKS, save_bpe_tokenizer
    from oq2vl_jax.data.text.codec import TextCodec

    save_bpe_tokenizer({**BYTE_RANKS, b"20": 256, b"23": 257, b"2023": 258}, str(tmp_path))
    file, settings = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    file.write_text(file.read_text().replace("|\\\\p{N}|", "|\\\\p{N}{1,4}|"))
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}))
    expected = tokenizers.Tokenizer.from_file(str(file)).encode("2023", add_special_tokens=False).ids
    codec = TextCodec.from_transformers(str(tmp_path))
    assert codec.encode("2023") == expected == [258]
    (tmp_path / "saved").mkdir()
    codec.save(tmp_path / "saved")
    assert TextCodec.load(str(tmp_path / "saved")).encode("2023") == [258]


def test_the_high_half_of_an_id_is_splitmix64():
    """The first output of the published generator with seed 0, whose state is then the golden ratio's 64 bits."""
    assert int(mixed(np.array([0x9E3779B97F4A7C15], np.uint64))[0]) == 0xE220A8397B1DCDAF
    assert uid_of_key(str(10**17)) == f"{int(mixed(np.array([10**17], np.uint64))[0]):016x}{10**17:016x}"
