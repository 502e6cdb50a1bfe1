"""The measurements run at a small size and report what they say they do. Their speeds are not judged here."""

import json
import subprocess
import sys

from oq2vl_jax.bench import filter, pack, packing, rows


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


def test_packing_end_to_end_keeps_the_image_bytes(byte_tokenizer_folder):
    ours, theirs = pack.measure(pack.Pack(byte_tokenizer_folder, num_shards=1, samples_per_shard=30, num_workers=1))
    assert ours["samples"] == theirs["samples"] == 30
    assert theirs["times_published"] == 1


def test_reading_rows(byte_tokenizer_folder):
    results = rows.measure(rows.Rows(byte_tokenizer_folder, num_samples=20, repeats=1))
    assert all(result["per_second"] > 0 for result in results)


def test_filtering():
    membership, filtering = filter.measure(filter.Filter(num_rows=20_000, repeats=1))
    assert membership["rows"] == filtering["rows"] == 20_000
