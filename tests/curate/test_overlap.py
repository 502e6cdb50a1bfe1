"""Training pictures that are a benchmark's: found though re-encoded, resized or cropped, and others left alone."""

import io
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from oq2vl_jax.curate.fingerprints import fingerprint
from oq2vl_jax.curate.overlap import OverlapConfig, find_overlap
from oq2vl_jax.data.packing.packer import PackConfig, pack_shards
from oq2vl_jax.data.samples.ids import parse_uid, uid_of_text
from oq2vl_jax.data.samples.uids import UidSet
from oq2vl_jax.errors import UserError
from oq2vl_jax.jobs import Execution

NUM_BENCHMARK, NUM_TRAINING, NUM_COPIES = 200, 1000, 50


def encoded(image, quality=85, image_format="JPEG"):
    buffer = io.BytesIO()
    image.save(buffer, image_format, quality=quality)
    return buffer.getvalue()


def photographs():
    from skimage import data

    names = ("astronaut", "coffee", "chelsea", "rocket", "camera", "coins", "page", "clock", "moon")
    return [Image.fromarray(np.asarray(getattr(data, name)())).convert("RGB") for name in names]


def scene(rng, photos):
    """A region of a photograph with another one pasted in: a picture of its own."""
    photo = photos[rng.integers(len(photos))]
    width, height = int(rng.integers(120, photo.width)), int(rng.integers(100, photo.height))
    x, y = int(rng.integers(photo.width - width + 1)), int(rng.integers(photo.height - height + 1))
    image = photo.crop((x, y, x + width, y + height)).resize((int(rng.integers(160, 320)), int(rng.integers(160, 320))))
    other = (
        photos[rng.integers(len(photos))].resize((image.width // 2, image.height // 2)).rotate(int(rng.integers(360)))
    )
    image.paste(other, (int(rng.integers(image.width // 2)), int(rng.integers(image.height // 2))))
    return image


def altered(image, i, rng):
    """The picture with other bytes: re-encoded, resized, or cropped by 2 %; every tenth is the same file."""
    dx, dy = max(1, round(0.02 * image.width)), max(1, round(0.02 * image.height))
    if i % 10 == 9:
        return encoded(image)
    if i % 3 == 0:
        return encoded(image, 40) if i % 2 else encoded(image, image_format="PNG")
    if i % 3 == 1:
        scale = rng.uniform(0.5, 1.5)
        return encoded(image.resize((int(scale * image.width), int(scale * image.height))), 80)
    left, top = int(rng.integers(2)), int(rng.integers(2))
    return encoded(image.crop((left * dx, top * dy, image.width - (1 - left) * dx, image.height - (1 - top) * dy)), 80)


def write_benchmark(folder, images):
    folder.mkdir()
    number = len(images)
    table = pa.table({
        "index": list(range(number)), "question": ["What?\nOptions: A: a, B: b, C: c, D: d"] * number,
        "image": pa.array(images, pa.binary()), "answer": ["A"] * number, "category": ["c"] * number,
        "l2_category": ["d"] * number, "meta_info": ["m"] * number,
    })  # fmt: skip
    parquet.write_table(table, folder / "mmstar.parquet")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A benchmark and 1,000 training pictures, of which 50 are the benchmark's."""
    folder, rng, photos = tmp_path_factory.mktemp("overlap"), np.random.default_rng(0), photographs()
    held = [scene(rng, photos) for _ in range(NUM_BENCHMARK)]
    write_benchmark(folder / "benchmarks", [encoded(image) for image in held])
    training = [altered(held[i], i, rng) for i in range(NUM_COPIES)]
    training += [encoded(scene(rng, photos)) for _ in range(NUM_TRAINING - NUM_COPIES)]
    table = pa.table({"id": [f"t{i}" for i in range(NUM_TRAINING)], "image": training,
                      "caption": ["a picture"] * NUM_TRAINING})  # fmt: skip
    parquet.write_table(table, folder / "data.parquet", row_group_size=300)
    return folder


@pytest.fixture(scope="module")
def report(data):
    return find_overlap(
        OverlapConfig(
            (str(data / "data.parquet"),), str(data / "benchmarks"), str(data / "out"), execution=Execution(1)
        )
    )


def test_copies_are_found_and_others_are_not(data, report):
    lines = [json.loads(line) for file in sorted((data / "out").glob("matches-*.jsonl")) for line in file.open()]
    found = {int(line["key"][1:]) for line in lines}
    copies = found & set(range(NUM_COPIES))
    print(f"found {len(copies)} of {NUM_COPIES}, {len(found - copies)} others")
    assert len(copies) >= 45  # measured 50
    assert len(found - copies) <= 5  # measured 0
    assert all(line["item"] == line["key"][1:] for line in lines if int(line["key"][1:]) < NUM_COPIES)
    of = report["benchmarks"]["mmstar"]
    assert (of["pictures"], of["same_bytes"]) == (NUM_BENCHMARK, NUM_COPIES // 10)
    assert of["overlapping"] == len(copies)
    assert report["pictures"] == NUM_TRAINING
    page = (data / "out" / "report.html").read_text()
    assert page.count("<img") == 2 * len(lines)


def test_the_ids_leave_the_samples_out_of_packing(data, report, tmp_path, byte_tokenizer_folder):
    uids = UidSet.load(str(data / "out" / "uids.npy"))
    assert uids.count(*parse_uid(uid_of_text("t9"))) == 1
    options = {"execution": Execution(1), "num_tokens": 96, "max_images": 3, "visual_tokens": 4}
    source, out = str(data / "data.parquet"), str(tmp_path / "packed")
    manifest = pack_shards(
        PackConfig(source, out, byte_tokenizer_folder, without_uids=str(data / "out" / "uids.npy"), **options)
    )
    assert manifest["skipped"] == {"in_without_uids": len(uids)}
    assert manifest["documents"] == NUM_TRAINING - len(uids)
    only = pack_shards(
        PackConfig(source, f"{out}-only", byte_tokenizer_folder, uids=str(data / "out" / "uids.npy"), **options)
    )
    assert only["documents"] == len(uids)


def test_it_goes_on_where_it_stopped(data, report, tmp_path):
    before = {file.name: file.stat().st_mtime_ns for file in (data / "out").glob("matches-*.jsonl")}
    (data / "out" / "matches-00001.json").unlink()
    again = find_overlap(
        OverlapConfig(
            (str(data / "data.parquet"),), str(data / "benchmarks"), str(data / "out"), execution=Execution(1)
        )
    )
    assert again == report
    after = {file.name: file.stat().st_mtime_ns for file in (data / "out").glob("matches-*.jsonl")}
    assert [name for name in before if before[name] != after[name]] == ["matches-00001.jsonl"]


def test_plain_pictures_have_no_perceptual_hash():
    plain = [encoded(Image.new("RGB", (60, 60), colour)) for colour in ("white", "navy")]
    assert [fingerprint(data).near for data in plain] == [(), ()]
    assert fingerprint(b"no picture").near == ()


def test_mistakes_are_one_sentence(data, tmp_path):
    source = str(data / "data.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no files of a benchmark here"):
        find_overlap(OverlapConfig((source,), str(tmp_path / "empty"), str(tmp_path / "out")))
    with pytest.raises(UserError, match="no benchmark 'mmstat'"):
        find_overlap(OverlapConfig((source,), str(data / "benchmarks"), str(tmp_path / "out"), names="mmstat"))
    done = subprocess.run(
        [sys.executable, "-m", "oq2vl_jax.curate.overlap", source, "--tasks", str(tmp_path / "none"), "--out",
         str(tmp_path / "out")], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no such folder" in done.stderr
