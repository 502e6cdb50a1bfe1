"""Interleaved documents in parquet: as in tars, and cut where they are longer than a row, with nothing lost."""

import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from oq2vl_jax.data.packing.documents import Limits, cut_document
from oq2vl_jax.data.packing.packed import PackedRows
from oq2vl_jax.data.packing.packer import PackConfig, pack_shards
from oq2vl_jax.data.packing.rows import decode_row
from oq2vl_jax.data.samples.formats.parquet import place_cells
from oq2vl_jax.data.samples.shards import Sample
from oq2vl_jax.jobs import Execution
from tests.data.conftest import embedded, png, tar_of

DOCUMENTS = [
    (["once", None, "upon", "a time"], [None, png(seed=1), None, None]),
    ([None, None, "two pictures first"], [png(seed=2), png(seed=3), None]),
    (["a text", None, "and a hole", None], [None, None, None, png(seed=4)]),
]
LIMITS = Limits("chatml", 64, 3, 4)


def pack(path, folder, tokenizer, **options):
    config = PackConfig(path, str(folder), tokenizer, execution=Execution(1), **{
        "num_tokens": 192, "max_images": 4, "visual_tokens": 4} | options)  # fmt: skip
    manifest = pack_shards(config)
    return manifest, b"".join(file.read_bytes() for file in sorted(folder.glob("*.array_record")))


def test_documents_of_each_layout_pack_to_the_same_rows(tmp_path, byte_tokenizer_folder):
    members = [
        (
            f"{i:03d}.json",
            json.dumps({"texts": texts, "image_info": [image and embedded(image) for image in images]}).encode(),
        )
        for i, (texts, images) in enumerate(DOCUMENTS)
    ]
    tar_of(tmp_path / "a.tar", members)
    keys, texts = [f"{i:03d}" for i in range(len(DOCUMENTS))], [texts for texts, _ in DOCUMENTS]
    parallel = [[image and {"bytes": image, "path": None} for image in images] for _, images in DOCUMENTS]
    table = pa.table({"key": keys, "texts": texts, "images": parallel})
    parquet.write_table(table, tmp_path / "obelics.parquet")
    expected = pack(str(tmp_path / "a.tar"), tmp_path / "tar", byte_tokenizer_folder)
    found = pack(str(tmp_path / "obelics.parquet"), tmp_path / "parquet", byte_tokenizer_folder)
    assert found[1] == expected[1]
    for name in ("samples", "documents", "images", "skipped", "notes"):
        assert found[0][name] == expected[0][name]


def test_pictures_of_mmc4_stand_before_the_text_that_they_name():
    cells = [{"matched_text_index": 1, "bytes": b"a"}, {"matched_text_index": 0, "bytes": b"b"}]
    assert place_cells(["x", "y"], cells) == ([None, "x", None, "y"], [cells[1], None, cells[0], None])
    assert place_cells(["x"], cells) is None
    assert place_cells(["x", None, "y"], [b"a", b"b", b"c", b"d"]) is None


def made_document(rng):
    """1 to 30 pictures and 200 to 8,000 tokens, at 64 tokens a row: 1 to 150 rows."""
    num_images, words = int(rng.integers(1, 31)), int(rng.integers(4, 160))
    cuts = np.sort(rng.integers(0, words + 1, num_images))
    elements, start = [], 0
    for cut in [*cuts, words]:
        if cut > start:
            elements.append(" ".join(f"w{i}" for i in range(start, cut)))
        elements.append(None)
        start = cut
    elements = elements[:-1] if elements.count(None) > num_images else elements
    return Sample("k", [png(seed=i) for i in range(num_images)], elements=elements)


@pytest.mark.parametrize("seed", range(20))
def test_the_parts_of_a_cut_document_are_the_document(seed, codec):
    sample = made_document(np.random.default_rng(seed))
    parts, notes = cut_document(sample, codec, LIMITS)
    whole = codec.document(sample, "chatml", LIMITS.visual_tokens)
    inner = [token for part in parts for token in part.tokens[1:-1].tolist()]
    assert inner == whole.tokens[1:-1].tolist()
    assert [image for part in parts for image in part.images] == sample.images
    assert all(len(part.tokens) <= LIMITS.num_tokens and len(part.images) <= LIMITS.max_images for part in parts)
    assert all(int((part.tokens == codec.special.image).sum()) == 4 * len(part.images) for part in parts)
    assert notes.count("document_cut") == (len(parts) > 1)
    assert notes.count("extra_part") == len(parts) - 1
    assert len({part.key for part in parts}) == len(parts)


def test_a_document_that_fits_is_the_same_cut_or_not(codec):
    sample = Sample("k", [png(), png(seed=1)], elements=["one", None, "two", None])
    (part,), notes = cut_document(sample, codec, LIMITS)
    whole = codec.document(sample, "chatml", LIMITS.visual_tokens)
    assert (part.tokens == whole.tokens).all()
    assert (part.is_labelled == whole.is_labelled).all()
    assert (part.key, notes) == ("k", [])


def test_counts_of_cut_documents_add_up(tmp_path, byte_tokenizer_folder):
    rng = np.random.default_rng(7)
    samples = [made_document(rng) for _ in range(12)] + [Sample("k", [], elements=["no picture"])]
    samples.append(Sample("k", [png()], elements=["one", None]))
    cells = []
    for sample in samples:
        images = iter(sample.images)
        cells.append([next(images) if text is None else None for text in sample.elements])
    table = pa.table(
        {"texts": [sample.elements for sample in samples], "images": pa.array(cells, pa.list_(pa.binary()))}
    )
    parquet.write_table(table, tmp_path / "data.parquet", row_group_size=5)
    manifest, _ = pack(str(tmp_path / "data.parquet"), tmp_path / "cut", byte_tokenizer_folder)
    assert manifest["skipped"] == {"image_missing": 1}
    assert manifest["documents"] == 13 + manifest["notes"]["extra_part"]
    assert manifest["images"] == sum(len(sample.images) for sample in samples)
    rows = [decode_row(row) for row in PackedRows(str(tmp_path / "cut"))]
    assert sum(len(row.images) for row in rows) == manifest["images"]
    skipped, _ = pack(str(tmp_path / "data.parquet"), tmp_path / "skip", byte_tokenizer_folder, long_documents="skip")
    assert skipped["documents"] + sum(skipped["skipped"].values()) == 14
    assert sum(skipped["skipped"].values()) > 1
