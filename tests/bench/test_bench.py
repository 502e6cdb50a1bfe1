"""The measurements run at a small size and report what they say they do. Their speeds are not judged here."""

import json
import subprocess
import sys

import pytest

from oq2vl_jax.bench import filter, pack, packing, reshard, rows
from oq2vl_jax.bench.photo_shards import write_photo_shards
from oq2vl_jax.errors import UserError


def test_bin_assignment_as_json():
    command = [
        sys.executable,
        "-m",
        "oq2vl_jax.bench",
        "packing",
        "--num-documents",
        "2000",
        "--repeats",
        "1",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)
    assert [result["documents"] for result in results] == [2000, 2000]
    assert all(0.9 < result["fill"] <= 1 and result["most_images_in_a_row"] <= 28 for result in results)
    assert packing.measure(packing.Packing(num_documents=2000))[0]["rows"] == results[0]["rows"]


def test_packing_end_to_end_and_the_published_approach_keep_every_sample(byte_tokenizer_folder, tmp_path):
    config = pack.Pack(byte_tokenizer_folder, num_shards=1, samples_per_shard=30, num_workers=1)
    ours, theirs = pack.measure(config)
    assert ours["samples"] == theirs["samples"] == 30
    (shard,) = write_photo_shards(tmp_path, 1, 30, seed=0)
    (tmp_path / "published").mkdir()
    pack.pack_shard_as_published(byte_tokenizer_folder, tmp_path / "published", shard)
    rows = [json.loads(file.read_text()) for file in (tmp_path / "published").glob("*.json")]
    assert len({document["key"] for row in rows for document in row["data"]}) == 30
    assert all(sum(row["lengths"]) <= pack.NUM_TOKENS for row in rows)


def test_reading_rows(byte_tokenizer_folder):
    results = rows.measure(rows.Rows(byte_tokenizer_folder, num_samples=20, repeats=1))
    assert all(result["per_second"] > 0 for result in results)


def test_resharding():
    (result,) = reshard.measure(reshard.Reshard(num_shards=2, samples_per_shard=50, kept_share=0.5, num_workers=1))
    assert result["samples"] == 100
    assert 25 < result["kept"] < 75


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        filter.measure(filter.Filter(num_rows=10, folder=str(tmp_path / "none")))


def test_filtering():
    membership, filtering = filter.measure(filter.Filter(num_rows=20_000, repeats=1))
    assert membership["rows"] == filtering["rows"] == 20_000
    share = int(filtering["what"].split(", ")[1].split()[0]) / 20_000
    assert 0.2 < share < 0.2 + 0.8 * 0.3  # the subset, and of the rest what is both basic and among the top 30 %
    assert 0.05 < filtering["peak_gib"] < 2
