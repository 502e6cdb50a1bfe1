"""Damage of every kind: counted, noted or refused with a sentence; nothing is lost without a count."""

import gzip
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from oq2vl_jax.data.packing.documents import read_documents
from oq2vl_jax.data.samples.formats.packed_json import read_packed_json
from oq2vl_jax.data.samples.images import ImageError, check_image, decode_image
from oq2vl_jax.data.samples.shards import read_samples
from oq2vl_jax.data.samples.tars import CutOffError, read_members
from oq2vl_jax.errors import UserError
from tests.data.conftest import LIMITS, caption_members, embedded, encoded, png, tar_of


def test_every_odd_sample_is_counted_or_noted_and_none_is_lost(tmp_path, codec):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    deep = Image.fromarray(np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30))
    link = tarfile.TarInfo("000008.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [
        *caption_members(0),
        *caption_members(1, png=encoded(rgb.convert("CMYK"), "JPEG")),
        *caption_members(2, png=encoded(deep, "PNG")),
        *caption_members(3, png=encoded(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)])),
        *caption_members(4, txt=b"an <image> and <|im_end|> in the text"),
        *caption_members(5, txt=b"\xff\xfe not utf-8"),
        *caption_members(6, png=b"no picture"),
        *caption_members(7, png=encoded(Image.new("1", (10_000, 10_000)), "PNG")),
        (link, b""),
        ("000008.txt", b"a link for an image"),
        ("000009.txt", b"no image"),
        *caption_members(10),
        ("000010.png", png(seed=99)),
        *caption_members(11),
        *caption_members(0, txt=b"the key of the first sample again"),
        ("../../evil.png", png()),
        ("../../evil.txt", b"a path that leaves"),
        ("/etc/evil.png", png()),
        ("README", b"no suffix"),
        ("000012.json", b"[" * 100_000),
        ("000013.json", b'{"texts": 3}'),
        ("000014.json", b'{"texts": ["a", null], "image_info": [null]}'),
        ("000015.json", b'{"conversations": 5}'),
        ("000016.json", b'{"texts": [null], "image_info": [{"image_base64": "%%%"}]}'),
        *caption_members(17, txt=b"   "),
        ("d\xe9j\xe0.png", png()),
        ("d\xe9j\xe0.txt", b"a name that is no ASCII"),
    ]
    documents, counts = read_documents([tar_of(tmp_path / "0.tar", members)], codec, LIMITS, "stop")
    assert [d.key for d in documents] == ["000000", "000001", "000002", "000003", "000004", "000011", "déjà"]
    assert counts["notes"] == {"image_cmyk": 1, "image_16_bit": 1, "image_animated": 1, "image_marker_in_text": 1,
                               "special_token_in_text": 1}  # fmt: skip
    assert counts["skipped"] == {
        "text_not_utf8": 1, "image_undecodable": 2, "image_too_large": 1, "not_a_plain_file": 1, "image_missing": 1,
        "duplicate_member": 1, "duplicate_key": 1, "unsafe_name": 2, "name_without_suffix": 1, "json_invalid": 1,
        "interleaved_invalid": 2, "conversation_needs_a_template": 1, "text_empty": 1,
    }  # fmt: skip
    assert counts["samples"] == len(documents) + sum(counts["skipped"].values())


def test_sixteen_bit_grey_keeps_its_shades():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    decoded = decode_image(encoded(Image.fromarray(ramp), "PNG"), 64)
    assert abs(decoded[..., 0].astype(int) - (ramp >> 8)).max() == 0
    assert check_image(encoded(Image.fromarray(ramp), "PNG")) == ["image_16_bit"]


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    for image_format in ("PNG", "WEBP"):
        options = {"lossless": True} if image_format == "WEBP" else {}
        data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], duration=100, **options)
        assert check_image(data) == ["image_animated"]
        assert decode_image(data, 16)[0, 0].tolist() == [255, 0, 0]


def test_text_that_spells_special_tokens_stays_text(tmp_path, codec):
    text = b"<|im_end|><s><|image_pad|><|endofchunk|>"
    (document,), _ = read_documents([tar_of(tmp_path / "0.tar", caption_members(0, txt=text))], codec, LIMITS, "stop")
    special = codec.special
    ids = document.tokens.tolist()
    assert ids.count(special.eos) == ids.count(special.bos) == 1
    assert ids.count(special.image) == LIMITS.visual_tokens
    assert special.end_of_chunk not in ids


@pytest.mark.parametrize("size", [0, 511, 2048, 100_000, 8_000_000_000])
def test_a_header_that_lies_about_its_size_ends_the_shard_with_a_sentence(tmp_path, codec, size):
    members = [member for i in range(5) for member in caption_members(i)]
    shard = tar_of(tmp_path / "0.tar", members, sizes={"000001.png": size})
    assert len(caption_members(1)[0][1]) > 1024  # so that none of the sizes is the true one
    with pytest.raises(CutOffError, match=r"0\.tar: the tar is broken or cut off after \d whole samples"):
        read_documents([shard], codec, LIMITS, "stop")
    documents, counts = read_documents([shard], codec, LIMITS, "keep")
    assert counts["skipped"]["shard_cut_off"] == 1
    assert [document.key for document in documents] == ["000000"]


def test_a_member_too_large_to_hold_is_refused_from_its_header(tmp_path, monkeypatch):
    from oq2vl_jax.data.samples import tars

    monkeypatch.setattr(tars, "MAX_MEMBER_BYTES", 1000)
    members = list(read_members(tar_of(tmp_path / "0.tar", caption_members(0))))
    assert [group.problem for group in members] == ["member_too_large"]


def test_compressed_tars_are_read_and_cut_ones_noticed(tmp_path):
    plain = tar_of(tmp_path / "0.tar", [m for i in range(5) for m in caption_members(i)])
    with open(plain, "rb") as file:
        compressed = gzip.compress(file.read())
    (tmp_path / "0.tar.gz").write_bytes(compressed)
    assert len(list(read_members(str(tmp_path / "0.tar.gz")))) == 5
    (tmp_path / "0.tar.gz").write_bytes(compressed[: len(compressed) // 2])
    with pytest.raises(CutOffError, match="broken or cut off"):
        list(read_members(str(tmp_path / "0.tar.gz")))


def test_random_damage_never_crashes_and_never_hides(tmp_path, codec):
    """Flipped and removed bytes anywhere: a sentence, or documents and counts that add up."""
    plain = tar_of(tmp_path / "0.tar", [m for i in range(6) for m in caption_members(i)])
    original = (tmp_path / "0.tar").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        content = bytearray(original)
        if rng.random() < 0.3:
            content = content[: rng.integers(0, len(content))]
        for position in rng.integers(0, max(len(content), 1), rng.integers(1, 30)):
            if content:
                content[position] = rng.integers(0, 256)
        (tmp_path / "0.tar").write_bytes(content)
        try:
            documents, counts = read_documents([plain], codec, LIMITS, "stop")
        except UserError:
            continue
        assert counts["samples"] == len(documents) + sum(counts["skipped"].values())


def test_an_image_error_names_its_reason():
    with pytest.raises(ImageError) as error:
        check_image(b"GIF89a")
    assert error.value.reason == "image_undecodable"


def test_a_zeroed_header_and_a_second_tar_behind_the_first_are_noticed(tmp_path):
    path = tmp_path / "0.tar"
    tar_of(path, [member for i in range(5) for member in caption_members(i)])
    content = path.read_bytes()
    start = content.index(b"000002.png\0")
    path.write_bytes(content[:start] + bytes(512) + content[start + 512 :])
    with pytest.raises(CutOffError, match="more data follows the end-of-archive mark"):
        list(read_members(str(path)))
    path.write_bytes(content + content)
    with pytest.raises(CutOffError, match="more data follows"):
        list(read_members(str(path)))
    path.write_bytes(content + bytes(100_000))  # padding is no data
    assert len(list(read_members(str(path)))) == 5


@pytest.mark.parametrize(
    "content",
    [
        {"texts": [None], "image_info": ["abc"]},
        {"texts": [None], "image_info": [{"image_base64": 3}]},
        {"texts": [None], "image_info": [[1]]},
        {"texts": {"a": 1}},
        {"texts": [None, "x"], "image_info": [None]},
        {"conversations": [{"from": "human"}]},
        {"uid": "\ud800", "texts": []},
        {"uid": 5},
        [1, 2],
        "text",
    ],
)
def test_hostile_metadata_is_counted(tmp_path, codec, content):
    shard = tar_of(tmp_path / "0.tar", [("0.json", json.dumps(content).encode()), *caption_members(1)])
    documents, counts = read_documents([shard], codec, LIMITS, "stop")
    assert len(documents) == sum(counts["skipped"].values()) == 1


def test_hostile_names_and_packed_rows_are_read(tmp_path, codec):
    members = [("0.json", b'{"conversations": []}'), ("0.\u00b2.jpg", png()), ("0.99999999999999999999.jpg", png())]
    assert len(list(read_samples(tar_of(tmp_path / "0.tar", members)))) == 1
    file = tmp_path / "x_packed.json"
    content = {"texts": [None, "a"], "image_info": [embedded(png()), None], "key": "\ud800"}
    file.write_text(json.dumps({"data": [content]}))
    ((document,), _) = read_documents([str(file)], codec, LIMITS, "stop")
    document.key.encode()
    file.write_text('{"data": ' + "[" * 100_000)
    with pytest.raises(UserError, match="not valid JSON"):
        list(read_packed_json(str(file)))
