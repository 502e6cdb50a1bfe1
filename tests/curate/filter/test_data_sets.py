"""Ratings in the parquet files of a data set choose its samples, and packing takes those that are chosen."""

import pyarrow as pa
import pytest
from pyarrow import parquet

from oq2vl_jax.curate.filter.run import FilterCommand, run_filter
from oq2vl_jax.data.packing.packed import PackedRows
from oq2vl_jax.data.packing.packer import PackConfig, pack_shards
from oq2vl_jax.data.packing.rows import decode_row
from oq2vl_jax.errors import UserError
from oq2vl_jax.jobs import Execution
from tests.data.conftest import png

COUNT = 30


def write(folder, **named):
    """FineVision's columns; two files, so that the number of a row is one within its file."""
    for part in range(2):
        rows = range(part * COUNT // 2, (part + 1) * COUNT // 2)
        table = {
            "images": pa.array([[{"bytes": png(seed=i), "path": None}] for i in rows]),
            "texts": [[{"user": "what?", "assistant": f"answer {i}"}] for i in rows],
            "relevance_min": [i % 5 + 1 for i in rows],
            "relevance_ratings": [[i % 5 + 1] for i in rows],
        }
        table |= {name: [make(i) for i in rows] for name, make in named.items()}
        parquet.write_table(pa.table(table), folder / f"{part}.parquet", row_group_size=8)
    return str(folder / "*.parquet")


@pytest.mark.parametrize(
    "named", [{}, {"id": lambda i: f"sample/{i}"}, {"key": str}, {"uid": lambda i: f"{i:032x}"}, {"index": int}]
)
def test_ratings_choose_what_is_packed(named, tmp_path, byte_tokenizer_folder):
    pattern = write(tmp_path, **named)
    (tmp_path / "rules.toml").write_text('expression = "score(relevance_min >= 4)"')
    report = run_filter(FilterCommand(str(tmp_path / "rules.toml"), pattern, str(tmp_path / "chosen")))
    assert (report["samples"], report["kept"], report["invalid_uids"]) == (COUNT, 12, 0)
    config = PackConfig(
        pattern, str(tmp_path / "packed"), byte_tokenizer_folder, 192, 4, 4, template="chatml",
        uids=str(tmp_path / "chosen" / "uids.npy"), execution=Execution(1),
    )  # fmt: skip
    manifest = pack_shards(config)
    assert (manifest["documents"], manifest["skipped"]) == (12, {"not_in_uids": 18})
    images = {image for row in PackedRows(str(tmp_path / "packed")) for image in decode_row(row).images}
    assert images == {png(seed=i) for i in range(COUNT) if i % 5 + 1 >= 4}


def test_a_file_that_is_neither_metadata_nor_a_data_set_is_refused(tmp_path):
    parquet.write_table(pa.table({"relevance_min": [1]}), tmp_path / "a.parquet")
    (tmp_path / "rules.toml").write_text('expression = "score(relevance_min >= 4)"')
    with pytest.raises(UserError, match="no column uid"):
        run_filter(FilterCommand(str(tmp_path / "rules.toml"), str(tmp_path / "a.parquet"), str(tmp_path / "out")))
