"""Reading shards: every layout, as the published code writes it."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from oq2vl_jax.data.packing.documents import make_document, read_documents
from oq2vl_jax.data.samples.formats.packed_json import read_packed_json
from oq2vl_jax.data.samples.images import decode_image
from oq2vl_jax.data.samples.shards import read_samples
from oq2vl_jax.data.samples.tars import read_members
from oq2vl_jax.errors import UserError
from tests.data.conftest import LIMITS, embedded, encoded, png, tar_of

IMAGE, BOS, EOS, END_OF_CHUNK = "<|image_pad|>", "<s>", "<|im_end|>", "<|endofchunk|>"


def written(document, codec):
    """The text of a document with one placeholder per image; and its labelled part."""
    text = codec.decode_exact(document.tokens.tolist()).replace(IMAGE * LIMITS.visual_tokens, IMAGE)
    return text, codec.decode_exact(document.tokens[document.is_labelled].tolist())


def test_interleaved_documents_are_written_as_published(tmp_path, codec):
    a, b, dot = png(seed=1), png(seed=2), png(1, 30)
    texts = [None, "First <image>.", None, "Second.", None, None]
    info = [embedded(a), None, embedded(b), None, embedded(dot), None]
    content = json.dumps({"texts": texts, "image_info": info, "uid": "f" * 32}).encode()
    (sample,) = read_samples(tar_of(tmp_path / "0.tar", [("0.json", content)]))
    document, notes = make_document(sample, codec, LIMITS)
    text, labelled = written(document, codec)
    expected = f"{IMAGE}\nFirst <image-placeholder>.{END_OF_CHUNK}{IMAGE}\nSecond.{END_OF_CHUNK}"
    assert text == BOS + expected + EOS
    assert labelled == (BOS + expected + EOS).replace(IMAGE, "")
    assert document.images == [a, b]
    assert sample.uid == "f" * 32
    assert notes.count("empty_image_place") == 2
    assert "image_marker_in_text" in notes


def test_interleaved_documents_without_or_with_ten_images_are_left_out(tmp_path, codec):
    def document(num_images):
        info = [embedded(png(seed=i)) for i in range(num_images)] + [None]
        return json.dumps({"texts": [None] * num_images + ["text"], "image_info": info}).encode()

    members = [(f"{count}.json", document(count)) for count in (0, 1, 9, 10)]
    documents, counts = read_documents([tar_of(tmp_path / "0.tar", members)], codec, LIMITS, "stop")
    assert [document.key for document in documents] == ["1", "9"]
    assert counts["skipped"] == {"image_missing": 1, "too_many_images": 1}


def test_mint_pages_stand_where_the_texts_are_null(tmp_path, codec):
    pages = [Image.fromarray(np.full((40, 30), value, np.uint8)) for value in (0, 128, 255)]
    tiff = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    texts = [None, "between", None, None, "end"]
    members = [
        ("0.json", json.dumps({"texts": texts, "images": ["a", None, "b", "c", None]}).encode()),
        ("0.tiff", tiff),
    ]
    members += [("1.json", json.dumps({"texts": [None, "one page"]}).encode()), ("1.tiff", tiff)]
    members += [("2.json", json.dumps({"texts": [None]}).encode()), ("2.tiff", tiff[:300])]
    documents, counts = read_documents([tar_of(tmp_path / "0.tar", members)], codec, LIMITS, "stop")
    assert [round(decode_image(image, 8).mean()) for image in documents[0].images] == [0, 128, 255]
    assert written(documents[0], codec)[0] == (
        f"{BOS}{IMAGE}\nbetween{END_OF_CHUNK}{IMAGE}\n{IMAGE}\nend{END_OF_CHUNK}{EOS}"
    )
    assert counts["skipped"] == {"image_count_mismatch": 1, "image_undecodable": 1}
    assert counts["notes"] == {"pages_re_encoded": 1}


def test_published_packed_json_is_read_and_one_image_documents_become_captions(tmp_path, codec):
    a, b = png(seed=1), png(seed=2)
    data = [
        {"image_info": [embedded(a), None], "texts": [None, "a caption"], "key": "k1", "uid": "0" * 32, "length": 9},
        {"image_info": [embedded(a), None, embedded(b), None], "texts": [None, "x", None, "y"], "key": "k2"},
    ]
    file = tmp_path / "9f_packed.json"
    file.write_text(json.dumps({"data": data, "lengths": [9, 12]}))
    documents, counts = read_documents([str(file)], codec, LIMITS, "stop")
    texts = [written(document, codec)[0] for document in documents]
    assert texts == [f"{BOS}{IMAGE}\na caption{EOS}", f"{BOS}{IMAGE}\nx{END_OF_CHUNK}{IMAGE}\ny{END_OF_CHUNK}{EOS}"]
    assert [document.images for document in documents] == [[a], [a, b]]
    assert counts == {"samples": 2, "skipped": {}, "notes": {}}
    for content, message in (("{", "not valid JSON"), ('{"data": 3}', "expected"), ("[]", "expected")):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            list(read_packed_json(str(file)))


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_format_are_read_as_tarfile_reads_them(tmp_path, tar_format):
    """Long names, names with prefixes and umlauts, times with fractions, folders, empty files."""
    rng = np.random.default_rng(0)
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tar_format) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        for i in range(40):
            name = f"{'deep/' * int(rng.integers(0, 28))}{i:09d}{'ü' * (i % 3)}{'n' * int(rng.integers(0, 60))}"
            if tar_format != tarfile.USTAR_FORMAT and i % 10 == 9:
                name += "x" * 150
            if i == 20:
                tar.addfile(folder)
            for suffix in ("png", "json"):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.mtime = 1.7e9 + (0.25 if i % 2 else 0)
                data = rng.bytes(int(rng.integers(0, 3000)) if i else 0)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    with tarfile.open(path) as tar:
        expected = [(m.name, tar.extractfile(m).read()) for m in tar if m.isfile()]
    found = [
        (f"{members.key}.{suffix}", data)
        for members in read_members(str(path))
        for suffix, data in members.files.items()
    ]
    assert found == expected


def test_an_image_beside_a_text_is_noted(tmp_path, codec):
    content = {"texts": ["hi", None], "image_info": [embedded(png(seed=1)), embedded(png(seed=2))]}
    (sample,) = read_samples(tar_of(tmp_path / "0.tar", [("0.json", json.dumps(content).encode())]))
    assert sample.notes == ("image_beside_text",)
    assert sample.images == [png(seed=2)]
