"""Inspecting samples that are not packed: the figures are those that packing reports, on a page."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from oq2vl_jax.data.inspect import InspectCommand, inspect
from oq2vl_jax.data.inspection.survey import survey
from oq2vl_jax.data.packing.documents import Limits
from oq2vl_jax.data.packing.packer import PackConfig, pack_shards
from oq2vl_jax.data.samples.formats.format import Reading
from oq2vl_jax.errors import UserError
from oq2vl_jax.jobs import Execution
from tests.data.conftest import caption_members, png, tar_of
from tests.data.test_parquet import conversations, write_json, write_parquet

LIMITS = Limits("chatml", 160, 4, 4)


def write_mixed(folder):
    """Forty rows: some without a picture, with a broken one, too long, or a picture twice."""
    cells = [[png(seed=i % 7)] for i in range(40)]
    cells[3], cells[5], cells[6] = [b"no picture"], [], [png(1, 30)]
    talks = [conversations("<image>\nwhat?", "word " * (1 + i)) for i in range(40)]
    table = pa.table({"images": pa.array(cells, pa.list_(pa.binary())), "conversations": talks})
    parquet.write_table(table, folder / "mixed.parquet", row_group_size=9)
    return str(folder / "mixed.parquet")


def packed(path, folder, tokenizer, **options):
    return pack_shards(
        PackConfig(
            path, str(folder / "packed"), tokenizer, 160, 4, 4, template="chatml", execution=Execution(1), **options
        )
    )


def test_the_whole_survey_counts_what_packing_counts(tmp_path, byte_tokenizer_folder):
    path = write_mixed(tmp_path)
    manifest = packed(path, tmp_path, byte_tokenizer_folder)
    found, total = survey([path], byte_tokenizer_folder, LIMITS, Reading(), None, 50, 0, num_workers=1)
    assert (found.samples, total) == (40, (40, ""))
    assert found.skipped == manifest["skipped"]
    assert len(manifest["skipped"]) == 4
    assert found.notes == manifest["notes"]
    assert sum(number * samples for number, samples in found.pictures.items()) == 39
    assert len(found.hashes) == 9  # seven, a broken one and one of a pixel
    assert found.keys["image_undecodable"] == [f"{tmp_path.name}/mixed.parquet#3"]
    fitting = [tokens for tokens in found.tokens if tokens <= 160]
    assert sum(fitting) == manifest["tokens"]
    assert len(found.shown) == manifest["documents"]


def test_a_part_of_the_samples_is_read_in_two_processes(tmp_path, byte_tokenizer_folder):
    path = write_mixed(tmp_path)
    few, total = survey([path], byte_tokenizer_folder, LIMITS, Reading(), 12, 3, 0, num_workers=2)
    again, _ = survey([path], byte_tokenizer_folder, LIMITS, Reading(), 12, 3, 0, num_workers=1)
    assert 12 <= few.samples < 40
    assert total == (40, "")
    assert (few.tokens, [document.key for document in few.shown]) == (
        again.tokens, [document.key for document in again.shown])  # fmt: skip
    assert len(few.shown) == 3


@pytest.mark.parametrize("layout", ["json", "parquet", "tar"])
def test_the_page_of_each_format(layout, tmp_path, byte_tokenizer_folder):
    (tmp_path / "images").mkdir(exist_ok=True)
    path, number = {
        "json": lambda: (write_json(tmp_path), 24),
        "parquet": lambda: (write_parquet(tmp_path, "texts"), 24),
        "tar": lambda: (tar_of(tmp_path / "0.tar", [m for i in range(5) for m in caption_members(i)]), 5),
    }[layout]()
    command = InspectCommand(
        (str(path),), str(tmp_path / "page.html"), tokenizer=byte_tokenizer_folder, images=str(tmp_path / "images"),
        visual_tokens=4, template="chatml", num_workers=1, image_size=28, all=layout == "tar",
    )  # fmt: skip
    line = inspect(command)
    assert line.startswith(f"{number} samples in all, {number} read")
    page = (tmp_path / "page.html").read_text()
    assert "as the model will see them" in page
    assert page.count('<div class="row">') == number
    assert "data:image/jpeg;base64," in page


def test_mistakes_are_one_sentence(tmp_path, byte_tokenizer_folder):
    path = write_mixed(tmp_path)
    with pytest.raises(UserError, match="need --tokenizer"):
        inspect(InspectCommand((path,), str(tmp_path / "page.html")))
    with pytest.raises(UserError, match="--num-rows does not apply to samples"):
        inspect(InspectCommand((path,), str(tmp_path / "page.html"), num_rows=3, tokenizer=byte_tokenizer_folder))
    packed(path, tmp_path, byte_tokenizer_folder)
    with pytest.raises(UserError, match="--all does not apply to packed rows"):
        inspect(InspectCommand((str(tmp_path / "packed"),), str(tmp_path / "page.html"), all=True))
    with pytest.raises(UserError, match=r"no file .*none\.parquet"):
        inspect(InspectCommand(("none.parquet",), str(tmp_path / "page.html"), tokenizer=byte_tokenizer_folder))
    (tmp_path / "empty.json").write_text(json.dumps([]))
    with pytest.raises(UserError, match="the list is empty"):
        inspect(
            InspectCommand((str(tmp_path / "empty.json"),), str(tmp_path / "p.html"), tokenizer=byte_tokenizer_folder)
        )
