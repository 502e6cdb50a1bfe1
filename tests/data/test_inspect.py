"""The page of packed rows shows pictures, text and documents, and the page of a packed folder its numbers."""

import shutil

import pytest

from oq2vl_jax.data.inspect import InspectCommand, inspect
from oq2vl_jax.data.packing.packer import PackConfig, pack_shards
from oq2vl_jax.errors import UserError
from oq2vl_jax.jobs import Execution
from tests.data.conftest import caption_sample


@pytest.fixture
def packed(tmp_path, write_shard, byte_tokenizer_folder):
    samples = [caption_sample(i, text=f"<b>picture</b> {i}") for i in range(12)]
    samples.append({"__key__": "000099", "txt": b"no image"})
    shard = write_shard(tmp_path / "0.tar", samples)
    config = PackConfig(
        shard, str(tmp_path / "out"), byte_tokenizer_folder, 96, 3, 4, report=True, execution=Execution(1)
    )
    return tmp_path / "out", pack_shards(config)


def test_every_document_and_picture_is_on_the_page(packed, tmp_path):
    folder, manifest = packed
    line = inspect(InspectCommand((str(folder),), str(tmp_path / "rows.html"), num_rows=99))
    page = (tmp_path / "rows.html").read_text()
    assert page.count("<img") == manifest["images"] == 12
    assert page.count('class="document"') == manifest["documents"]
    assert "&lt;b&gt;picture&lt;/b&gt; 3&lt;|im_end|&gt;" in page  # escaped, special tokens as they are written
    assert "<b>picture" not in page
    assert f"{manifest['rows']:,} rows of 96 tokens" in line


def test_the_report_of_a_packed_folder_shows_its_manifest(packed):
    folder, manifest = packed
    page = (folder / "report.html").read_text()
    assert f"{manifest['documents']:,} documents in {manifest['rows']:,} rows" in page
    assert "image_missing" in page
    assert page.count("<svg") == 3
    assert sum(manifest["documents_per_row"].values()) == manifest["rows"]
    assert sum(manifest["document_tokens"].values()) == manifest["documents"]
    assert sum(int(k) * n for k, n in manifest["images_per_row"].items()) == manifest["images"]


def test_files_that_are_no_rows_are_explained(packed, tmp_path):
    folder, _ = packed
    content = bytearray((folder / "rows-00000.array_record").read_bytes())
    content[300:500] = bytes(byte ^ 0xFF for byte in content[300:500])
    for damaged in (content, b"\0" * 3000):
        (folder / "rows-00000.array_record").write_bytes(damaged)
        with pytest.raises(UserError, match=r"cannot be read|holds no rows"):
            inspect(InspectCommand((str(folder),), str(tmp_path / "rows.html")))
    with pytest.raises(UserError, match=r"cannot be read|holds no rows"):
        inspect(InspectCommand((str(folder),), str(tmp_path / "rows.html")))
    shutil.copy(folder / "rows-00000.array_record", tmp_path / "alone.array_record")
    with pytest.raises(UserError, match=r"no settings\.json beside the rows"):
        inspect(InspectCommand((str(tmp_path / "alone.array_record"),), str(tmp_path / "rows.html")))
    with pytest.raises(UserError, match="no packed rows here"):
        inspect(InspectCommand((str(tmp_path / "nothing"),)))
