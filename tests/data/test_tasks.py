"""One job on every executor, interrupted and not: the same names, order and bytes."""

import dataclasses
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from oq2vl_jax.curate.reshard import ReshardConfig, reshard
from oq2vl_jax.data.packing.packer import PackConfig, pack_shards
from oq2vl_jax.data.samples.uids import UidSet
from oq2vl_jax.errors import UserError
from oq2vl_jax.jobs import Execution
from tests.data.conftest import png

NUM_SHARDS, SAMPLES_PER_SHARD, NUM_KILLS = 6, 30, 5


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Six tars of captions with uids, and a uid set of some of them, one of them three times."""
    from webdataset import TarWriter

    folder = tmp_path_factory.mktemp("shards")
    for shard in range(NUM_SHARDS):
        with TarWriter(str(folder / f"{shard:05d}.tar"), mtime=0) as writer:
            for i in range(SAMPLES_PER_SHARD):
                number = SAMPLES_PER_SHARD * shard + i
                image = png(80, 60, number, "JPEG")
                sample = {"__key__": f"{number:09d}", "jpg": image, "txt": f"picture {number}".encode()}
                writer.write(sample | {"json": f'{{"uid": "{number:032x}"}}'.encode()})
    low = [number for number in range(NUM_SHARDS * SAMPLES_PER_SHARD) if number % 3] + [4, 4]
    UidSet(np.zeros(len(low), np.uint64), np.array(low, np.uint64)).save(str(folder / "uids.npy"))
    return folder


def pack(shards, out, tokenizer, **execution):
    config = PackConfig(f"{shards}/*.tar", str(out), tokenizer, 96, 3, 4, execution=Execution(**execution))
    return pack_shards(config)


def select(shards, out, **execution):
    config = ReshardConfig(f"{shards}/*.tar", f"{shards}/uids.npy", str(out), 2, execution=Execution(**execution))
    return reshard(config)


def digests(folder):
    """Name -> hash of every file, those of the tokenizer included."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def expected(shards, tmp_path_factory, byte_tokenizer_folder):
    """Both jobs by one process without interruption."""
    folder = tmp_path_factory.mktemp("expected")
    pack(shards, folder / "rows", byte_tokenizer_folder, num_workers=1)
    select(shards, folder / "tars", num_workers=1)
    return digests(folder)


@pytest.mark.parametrize("num_workers", [2, 4])
def test_workers_change_nothing(shards, tmp_path, byte_tokenizer_folder, expected, num_workers):
    pack(shards, tmp_path / "rows", byte_tokenizer_folder, num_workers=num_workers)
    select(shards, tmp_path / "tars", num_workers=num_workers)
    assert digests(tmp_path) == expected


def test_ranks_change_nothing_and_the_last_writes_the_manifest(shards, tmp_path, byte_tokenizer_folder, expected):
    for rank in (2, 0, 1):
        execution = {"num_workers": 1, "rank": rank, "world_size": 3}
        manifests = [
            pack(shards, tmp_path / "rows", byte_tokenizer_folder, **execution),
            select(shards, tmp_path / "tars", **execution),
        ]
        assert [manifest is None for manifest in manifests] == [rank != 1] * 2
    assert digests(tmp_path) == expected


def test_ray_changes_nothing(shards, tmp_path, byte_tokenizer_folder, expected):
    import ray

    try:
        pack(shards, tmp_path / "rows", byte_tokenizer_folder, executor="ray", ray_address="local")
        select(shards, tmp_path / "tars", executor="ray", ray_address="local")
        assert digests(tmp_path) == expected
        (tmp_path / "99999.tar").write_bytes(b"no tar")
        with pytest.raises(UserError, match=r"99999\.tar: the tar is broken"):
            pack(tmp_path, tmp_path / "broken", byte_tokenizer_folder, executor="ray", ray_address="local")
    finally:
        ray.shutdown()


def test_killed_at_random_moments_and_started_again_ends_in_the_same_bytes(
    shards, tmp_path, byte_tokenizer_folder, expected
):
    rng = random.Random(0)
    commands = {
        "rows": ["oq2vl_jax.data.pack", "--tokenizer", byte_tokenizer_folder, "--num-tokens", "96",
                 "--max-images", "3", "--visual-tokens", "4"],
        "tars": ["oq2vl_jax.curate.reshard", "--uids", f"{shards}/uids.npy", "--tars-per-task", "2"],
    }  # fmt: skip
    for name, arguments in commands.items():
        command = [sys.executable, "-m", *arguments, "--shards", f"{shards}/*.tar", "--out", str(tmp_path / name)]
        for _ in range(NUM_KILLS):
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
            time.sleep(rng.uniform(0.3, 2.5))
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for path, digest in digests(tmp_path).items():  # whatever looks whole is whole
                assert digest == expected.get(path) or not path.endswith((".array_record", ".tar", "manifest.json"))
        subprocess.run(command, check=True)
    assert digests(tmp_path) == expected


def test_a_finished_task_is_not_done_again_and_a_changed_input_is(shards, tmp_path, byte_tokenizer_folder):
    import shutil

    shutil.copytree(shards, tmp_path / "in")
    pack(tmp_path / "in", tmp_path / "rows", byte_tokenizer_folder, num_workers=1)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").glob("*.array_record")}
    (tmp_path / "in" / "00001.tar").write_bytes((shards / "00002.tar").read_bytes())
    pack(tmp_path / "in", tmp_path / "rows", byte_tokenizer_folder, num_workers=1)
    again = [path.name for path, time_ns in written.items() if path.stat().st_mtime_ns != time_ns]
    assert again == ["rows-00001.array_record"]


@pytest.mark.parametrize(
    ("execution", "message"),
    [({"num_workers": 0}, "num-workers"), ({"rank": 3, "world_size": 3}, r"--rank must be 0\.\.2"),
     ({"rank": -1}, "--rank")],
)  # fmt: skip
def test_impossible_executions_are_refused(execution, message):
    with pytest.raises(UserError, match=message):
        Execution(**execution)


def test_a_cluster_that_is_not_there_is_one_sentence(shards, tmp_path, byte_tokenizer_folder):
    with pytest.raises(UserError, match="no Ray cluster is running there"):
        pack(shards, tmp_path / "rows", byte_tokenizer_folder, executor="ray", ray_address="127.0.0.1:1")


def test_remote_paths_are_read_and_written(shards, byte_tokenizer_folder, expected):
    """fsspec's memory:// stands for s3:// and gs://."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(shards), "/in", recursive=True)
    pack("memory://in", "memory://out/rows", byte_tokenizer_folder, num_workers=1)
    config = ReshardConfig("memory://in/*.tar", "memory://in/uids.npy", "memory://out/tars", 2)
    reshard(ReshardConfig(config.shards, config.uids, config.out, 2, execution=Execution(1)))
    for name, digest in expected.items():
        if name.endswith((".array_record", ".tar")):
            assert hashlib.sha256(memory.cat(f"/out/{name}")).hexdigest() == digest, name
    assert memory.exists("/out/rows/manifest.json")
    assert memory.exists("/out/rows/tokenizer/tokenizer.json")


def test_a_full_disk_is_one_sentence_and_leaves_nothing_that_looks_whole(
    shards, tmp_path, byte_tokenizer_folder, expected
):
    """A limit on the size of files stands for the full disk; on a tmpfs of 3 MB both commands did the same."""
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
    packing = ["--tokenizer", byte_tokenizer_folder, "--num-tokens", "96", "--max-images", "3", "--visual-tokens", "4"]
    selecting = ["--uids", f"{shards}/uids.npy", "--tars-per-task", "2"]
    commands = {"oq2vl_jax.data.pack": (packing, "rows"), "oq2vl_jax.curate.reshard": (selecting, "tars")}
    for module, (options, out) in commands.items():
        arguments = [*options, "--out", str(tmp_path / out), "--shards", f"{shards}/*.tar", "--num-workers", "1"]
        code = f"{limited}sys.argv = {['x', *arguments]!r}; runpy.run_module({module!r}, run_name='__main__')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert "File too large" in done.stderr
        assert "what was whole is still whole" in done.stderr
        subprocess.run([sys.executable, "-m", module, *arguments], check=True)  # with room again, the same command
    assert digests(tmp_path) == expected


def test_a_folder_that_holds_the_input_or_something_else_is_not_overwritten(shards, tmp_path, byte_tokenizer_folder):
    import shutil

    shutil.copytree(shards, tmp_path / "in")
    (tmp_path / "in" / "00000.tar").rename(tmp_path / "in" / "00000000.tar")  # the name that the output would have
    before = digests(tmp_path / "in")
    config = ReshardConfig(f"{tmp_path}/in/*.tar", f"{shards}/uids.npy", f"{tmp_path}/in", execution=Execution(1))
    with pytest.raises(UserError, match=r"holds 00000000\.tar, which this command did not write"):
        reshard(config)
    assert digests(tmp_path / "in") == before
    pack(shards, tmp_path / "rows", byte_tokenizer_folder, num_workers=1)
    with pytest.raises(UserError, match=r"rows-00001\.array_record, made from more input than this time"):
        pack_shards(PackConfig(f"{shards}/00000.tar", f"{tmp_path}/rows", byte_tokenizer_folder, 96, 3, 4))


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"file": 3}'])
def test_a_damaged_report_means_that_the_task_is_done_again(shards, tmp_path, byte_tokenizer_folder, expected, content):
    pack(shards, tmp_path / "rows", byte_tokenizer_folder, num_workers=1)
    (tmp_path / "rows" / "rows-00002.json").write_text(content)
    pack(shards, tmp_path / "rows", byte_tokenizer_folder, num_workers=1)
    assert digests(tmp_path) == {name: digest for name, digest in expected.items() if name.startswith("rows/")}


def test_what_was_kept_of_a_cut_off_tar_does_not_stand_when_it_should_stop(shards, tmp_path, byte_tokenizer_folder):
    (tmp_path / "0.tar").write_bytes((shards / "00000.tar").read_bytes()[:60_000])
    keep = PackConfig(f"{tmp_path}/0.tar", f"{tmp_path}/rows", byte_tokenizer_folder, 96, 3, 4, broken_shards="keep",
                      execution=Execution(1))  # fmt: skip
    assert pack_shards(keep)["skipped"] == {"shard_cut_off": 1}
    with pytest.raises(UserError, match="broken or cut off"):
        pack_shards(dataclasses.replace(keep, broken_shards="stop"))


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_damaged_settings_are_one_sentence(shards, tmp_path, byte_tokenizer_folder, content):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "settings.json").write_text(content)
    with pytest.raises(UserError, match=r"settings\.json: (not valid JSON|expected a JSON object)"):
        pack(shards, tmp_path / "rows", byte_tokenizer_folder, num_workers=1)


def test_an_output_that_was_cut_off_later_is_made_again(shards, tmp_path, byte_tokenizer_folder, expected):
    pack(shards, tmp_path / "rows", byte_tokenizer_folder, num_workers=1)
    select(shards, tmp_path / "tars", num_workers=1)
    for file in (tmp_path / "rows" / "rows-00003.array_record", tmp_path / "tars" / "00000001.tar"):
        file.write_bytes(file.read_bytes()[:100])
    pack(shards, tmp_path / "rows", byte_tokenizer_folder, num_workers=1)
    select(shards, tmp_path / "tars", num_workers=1)
    assert digests(tmp_path) == expected


def test_an_input_replaced_while_its_task_ran_is_read_again(shards, tmp_path, monkeypatch):
    from oq2vl_jax.curate import reshard as module

    (tmp_path / "0.tar").write_bytes((shards / "00000.tar").read_bytes())
    config = ReshardConfig(f"{tmp_path}/0.tar", f"{shards}/uids.npy", f"{tmp_path}/out", execution=Execution(1))

    def reshard_and_replace(*arguments, work=module.reshard_files):
        report = work(*arguments)
        (tmp_path / "0.tar").write_bytes((shards / "00001.tar").read_bytes())
        return report

    monkeypatch.setattr(module, "reshard_files", reshard_and_replace)
    first = reshard(config)
    monkeypatch.undo()
    again = reshard(config)
    assert first["written"] != again["written"]


def test_an_input_that_is_an_output_and_an_empty_folder_name_are_refused(shards, tmp_path, byte_tokenizer_folder):
    select(shards, tmp_path / "tars", num_workers=1)
    config = ReshardConfig(
        f"{tmp_path}/tars/*.tar", f"{shards}/uids.npy", f"{tmp_path}/tars", 2, execution=Execution(1)
    )
    with pytest.raises(UserError, match=r"choose another folder"):
        reshard(config)
    for out in ("", " "):
        with pytest.raises(UserError, match="--out is empty"):
            pack(shards, out, byte_tokenizer_folder)
        with pytest.raises(UserError, match="--out is empty"):
            select(shards, out)
