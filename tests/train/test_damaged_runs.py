"""Files of a run, its checkpoint and its packed rows, damaged one by one: a sentence or the same result."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convert import to_hf
from oq2vl_jax.checkpoint import ITEMS, find_checkpoint, open_checkpoint
from oq2vl_jax.checkpoint_digests import check_digests
from oq2vl_jax.data.packing.packed import PackedRows, check_files, fingerprint, read_manifest
from oq2vl_jax.errors import UserError
from oq2vl_jax.generate.generator import Generator
from oq2vl_jax.train.run import run
from tests.train.conftest import TINY


def flipped(data: bytes, place: float = 0.5, bit: int = 3) -> bytes:
    changed = bytearray(data)
    changed[min(int(place * len(data)), len(data) - 1)] ^= 1 << bit
    return bytes(changed)


WAYS = {
    "emptied": lambda data: b"",
    "cut in half": lambda data: data[: len(data) // 2],
    "deleted": None,
    "another object": lambda data: b'{"a": [1, 2]}',
    "a list": lambda data: b"[]",
    "a flipped bit": flipped,
}


def make_run(folder):
    checkpoint = dataclasses.replace(TINY.checkpoint, every_num_steps=1)
    config = dataclasses.replace(TINY, run_dir=str(folder), num_steps=3, log_every=1, checkpoint=checkpoint)
    run(config, stop_at_step=2)
    return config


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """(configuration, folder) of a run with checkpoints 1 and 2 of 3 steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return make_run(folder), folder


@pytest.fixture
def copied(clean, tmp_path):
    shutil.copytree(clean[1], tmp_path / "run")
    return tmp_path / "run"


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def damage(file: Path, change) -> bool:
    """Whether the file is now another one."""
    data = file.read_bytes()
    if change is None:
        file.unlink()
        return True
    file.write_bytes(change(data))
    return change(data) != data


def test_every_damage_to_a_checkpoint_is_one_sentence(copied):
    """Whatever an item holds, in every way; what is right again after it is mended opens."""
    step = find_checkpoint(str(copied))
    counts = {"refused": 0, "of no effect": 0}
    for name in files_below(step):
        original = (step / name).read_bytes()
        for change in WAYS.values():
            if not damage(step / name, change):
                continue
            if name.split("/")[0] in ITEMS and not name.endswith("commit_success.txt"):
                with pytest.raises(UserError, match=r"the checkpoint is damaged: .*000001, the newest one before it"):
                    check_digests(step, ITEMS)
                counts["refused"] += 1
            else:
                try:
                    check_digests(step, ITEMS)
                    counts["of no effect"] += 1
                except UserError:
                    counts["refused"] += 1
            (step / name).write_bytes(original)
    print(counts)
    assert counts["refused"] > 150
    assert open_checkpoint(str(copied)) == step


def test_flipped_bits_are_refused_by_every_reader(copied, tmp_path, clean):
    """Two hundred places over the files of the checkpoint, some by way of the commands themselves."""
    step, rng = find_checkpoint(str(copied)), np.random.default_rng(0)
    names = [name for name in files_below(step) if name.split("/")[0] in ITEMS and "commit_success" not in name]
    sizes = np.array([(step / name).stat().st_size for name in names])
    readers = (
        lambda: run(dataclasses.replace(clean[0], run_dir=str(copied))),
        lambda: to_hf.export(to_hf.ToHFConfig(str(copied), str(tmp_path / "exported"))),
        lambda: Generator(str(copied)),
    )  # fmt: skip
    for i in range(200):
        name = names[rng.choice(len(names), p=sizes / sizes.sum())] if i % 2 else names[rng.integers(len(names))]
        original = (step / name).read_bytes()
        (step / name).write_bytes(flipped(original, rng.random(), int(rng.integers(8))))
        with pytest.raises(UserError, match="is not as it was written"):
            check_digests(step, ITEMS)
        is_read = name.split("/")[0] in ("model", "config", "tokenizer")
        for reader in readers if i % 20 == 0 and is_read else ():
            with pytest.raises(UserError, match="the checkpoint is damaged"):
                reader()
        (step / name).write_bytes(original)


def test_a_checkpoint_without_digests_is_read_with_a_line(copied, capsys):
    shutil.rmtree(find_checkpoint(str(copied)) / "digests")
    open_checkpoint(str(copied))
    assert "no digests" in capsys.readouterr().err


def packed_of(folder):
    return folder / "data" / "packed"


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer/tokenizer.json", "rows-00000.array_record"])
@pytest.mark.parametrize("way", WAYS)
def test_damage_to_packed_rows_is_one_sentence(name, way, copied, clean):
    """A deleted manifest lets configs/tiny.py pack its own rows again."""
    packed = packed_of(copied)
    damage(packed / name, WAYS[way])
    if (name, way) == ("manifest.json", "deleted"):
        return
    if way == "a flipped bit" and name != "tokenizer/tokenizer.json":
        return  # of a key or of a row that is not read: tested below
    with pytest.raises(UserError) as caught:
        run(dataclasses.replace(clean[0], run_dir=str(copied)))
    assert str(packed) in str(caught.value)


@pytest.fixture
def two_shards(tmp_path, write_shard, byte_tokenizer_folder):
    """A packed folder of two files of rows."""
    from oq2vl_jax.data.packing.packer import PackConfig, pack_shards
    from oq2vl_jax.data.packing.synthetic import captioned_shapes
    from oq2vl_jax.jobs import Execution

    for i in range(2):
        write_shard(tmp_path / f"{i}.tar", list(captioned_shapes(40, seed=i)))
    pack_shards(PackConfig(
        str(tmp_path / "{0..1}.tar"), str(tmp_path / "packed"), byte_tokenizer_folder, num_tokens=128, max_images=8,
        visual_tokens=4, template="plain", execution=Execution(num_workers=1),
    ))  # fmt: skip
    return tmp_path / "packed"


def test_another_shard_in_a_shards_place_is_found(two_shards):
    check_files(str(two_shards), is_whole=True)
    first, second = (two_shards / f"rows-0000{i}.array_record" for i in range(2))
    contents = first.read_bytes(), second.read_bytes()
    for swapped in ((contents[1], contents[0]), (contents[1], contents[1]), (contents[0], contents[0])):
        first.write_bytes(swapped[0])
        second.write_bytes(swapped[1])
        with pytest.raises(UserError, match=r"is not what was packed|were packed"):
            check_files(str(two_shards))
    first.write_bytes(contents[0])
    second.write_bytes(flipped(contents[1], 0.5))
    with pytest.raises(UserError, match="is not what was packed"):
        check_files(str(two_shards), is_whole=True)


def test_a_manifest_that_names_a_file_twice_is_refused(two_shards):
    file = two_shards / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"files": [manifest["files"][0]] * 2}))
    with pytest.raises(UserError, match=r"rows-00000\.array_record is named twice"):
        read_manifest(str(two_shards))


def test_a_moved_folder_has_the_same_fingerprint_and_other_rows_another(two_shards, tmp_path):
    found = fingerprint((str(two_shards),))
    shutil.move(two_shards, tmp_path / "moved")
    assert fingerprint((str(tmp_path / "moved"),)) == found
    file = tmp_path / "moved" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["files"].reverse()
    file.write_text(json.dumps(manifest))
    assert fingerprint((str(tmp_path / "moved"),)) != found


def test_a_flipped_bit_in_a_row_names_the_file_and_the_row(two_shards):
    """ArrayRecord checks what it reads; every bit of a file is either found or in no row."""
    file = two_shards / "rows-00001.array_record"
    original, rows = file.read_bytes(), PackedRows(str(two_shards))
    expected, refused = [rows[i] for i in range(len(rows))], []
    for place in np.linspace(0.05, 0.95, 12):
        file.write_bytes(flipped(original, place))
        try:
            damaged = PackedRows(str(two_shards))
            found = [damaged[i] for i in range(len(damaged))]
        except UserError as error:
            refused.append(str(error))
            continue
        assert found == expected
    assert refused
    assert all("rows-00001.array_record: row " in text or "its rows cannot be read" in text for text in refused)


def test_a_run_goes_on_with_its_rows_in_another_place(two_shards, tmp_path):
    data = dataclasses.replace(TINY.data, kind="packed", sources=(str(two_shards),))
    config = dataclasses.replace(TINY, data=data, run_dir=str(tmp_path / "run"), num_steps=2)
    run(config, stop_at_step=1)
    shutil.move(two_shards, tmp_path / "moved")
    data = dataclasses.replace(data, sources=(str(tmp_path / "moved"),))
    assert run(dataclasses.replace(config, data=data)) is not None


def test_every_damage_to_a_run_directory_is_a_sentence_or_of_no_effect(clean, tmp_path, capsys):
    """Whatever lies beside checkpoints/ and data/: none of it is read into the state that a resumed run starts from."""
    names = [name for name in files_below(clean[1]) if name.split("/")[0] not in ("checkpoints", "data")]
    assert {"config.json", "metrics.jsonl"} <= set(names)
    counts = {"refused": 0, "goes on": 0}
    for name in names:
        for way, change in WAYS.items():
            folder = tmp_path / "run"
            shutil.copytree(clean[1], folder)
            if (folder / name).stat().st_size and damage(folder / name, change):
                try:
                    run(dataclasses.replace(clean[0], run_dir=str(folder)), stop_at_step=2)
                    counts["goes on"] += 1
                except UserError as error:
                    assert str(folder) in str(error), (name, way)  # noqa: PT017
                    counts["refused"] += 1
            shutil.rmtree(folder)
    print(names, counts)
    assert "the records of steps 1 to 2 are not there" in capsys.readouterr().err
    assert counts["refused"] >= 6


def test_a_full_disk_during_a_checkpoint_is_one_sentence(copied):
    """A limit on the size of files stands for the full disk; on a tmpfs of 6 MB the sentence was the same."""
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "runpy.run_module('oq2vl_jax.train', run_name='__main__')"
    )
    flags = ("--run-dir", str(copied), "--num-steps", "3", "--checkpoint.every-num-steps", "1", "--log-every", "1")
    command = [sys.executable, "-c", limited, "configs/tiny.py", *flags]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # of which a file could be larger
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done.stderr
    assert "the checkpoint could not be written (File too large); the newest whole one is 2." in done.stderr
    assert "Traceback" not in done.stderr
    assert find_checkpoint(str(copied)).name == "000002"
