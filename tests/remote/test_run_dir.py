"""A remote run directory: a checkpoint counts when it is whole, one training at a time, and any machine goes on."""

import json
import os
import shutil
import socket
import threading

import pytest

from oq2vl_jax import paths
from oq2vl_jax.checkpoint_digests import FILE, ITEM, METADATA, write_digests
from oq2vl_jax.errors import UserError
from oq2vl_jax.remote import lock as remote_locks
from oq2vl_jax.remote.lock import remote_lock
from oq2vl_jax.remote.transfer import list_tree
from oq2vl_jax.remote_checkpoints import find_remote, whole_steps
from oq2vl_jax.train import remote_run_dir
from oq2vl_jax.train.remote_run_dir import local_run_dir, opened


def write_step(local, step, content="weights"):
    folder = local / "checkpoints" / f"{step:06d}"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "d").write_text(f"{content} {step}")
    (folder / ITEM).mkdir()
    write_digests(folder, ["model"], folder / ITEM / FILE)
    (folder / METADATA).write_text("{}")
    (local / "metrics.jsonl").write_text("".join(f'{{"step": {i}}}\n' for i in range(1, step + 1)))


@pytest.fixture
def bucket(tmp_path):
    """file:// stands for s3://."""
    (tmp_path / "bucket").mkdir()
    return f"file://{tmp_path}/bucket/run"


def steps_of(local):
    return sorted(int(path.name) for path in (local / "checkpoints").glob("*"))


def test_another_machine_goes_on_from_what_is_in_the_bucket(bucket, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    with opened(bucket, one, keep=1) as remote:
        write_step(one, 5)
        remote.push()
        write_step(one, 10)
        shutil.rmtree(one / "checkpoints" / "000005")  # as Orbax does beyond checkpoint.keep
    assert find_remote(bucket).endswith("000010")
    assert not list_tree(f"{bucket}/checkpoints/000005")
    with opened(bucket, other):
        assert steps_of(other) == [10]
        assert (other / "checkpoints" / "000010" / "model" / "d").read_text() == "weights 10"
        assert len((other / "metrics.jsonl").read_text().splitlines()) == 10
    assert not paths.exists(f"{bucket}/lock.json")


def test_a_start_elsewhere_that_fails_at_once_leaves_every_checkpoint(bucket, tmp_path):
    with opened(bucket, tmp_path / "one", keep=3):
        for step in (5, 10, 15):
            write_step(tmp_path / "one", step)

    def fails():
        with opened(bucket, tmp_path / "other", keep=3):
            raise UserError("another configuration")

    with pytest.raises(UserError, match="another configuration"):
        fails()
    assert sorted(whole_steps(bucket)) == [5, 10, 15]


def test_what_a_killed_upload_left_goes_with_the_next_checkpoint(bucket, tmp_path):
    (tmp_path / "bucket" / "run" / "checkpoints" / "000007" / "model").mkdir(parents=True)
    (tmp_path / "bucket" / "run" / "checkpoints" / "000007" / "model" / "d").write_text("half")
    with opened(bucket, tmp_path / "one"):
        write_step(tmp_path / "one", 10)
    assert not list_tree(f"{bucket}/checkpoints/000007")
    assert sorted(whole_steps(bucket)) == [10]


def test_what_other_processes_write_meanwhile_is_not_uploaded(bucket, tmp_path):
    local = tmp_path / "one"
    with opened(bucket, local):
        (local / "processes" / "1").mkdir(parents=True)
        for name in ("alive.json", "alive.json.node7-1.partial", "metrics.jsonl"):
            (local / "processes" / "1" / name).write_text("{}")
    assert paths.list_names(f"{bucket}/processes/1") == {"metrics.jsonl"}


def test_a_checkpoint_that_is_half_uploaded_does_not_count(bucket, tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    with opened(bucket, one) as remote:
        write_step(one, 5)
        remote.push()
    real, uploads = remote_run_dir.upload_tree, []

    def dies(folder, names, url):
        uploads.append(url)
        if names == [METADATA]:
            raise UserError("killed here")
        real(folder, names, url)

    monkeypatch.setattr(remote_run_dir, "upload_tree", dies)

    def save_and_die():
        with opened(bucket, one):
            write_step(one, 10)

    with pytest.raises(UserError, match="killed here"):
        save_and_die()
    monkeypatch.setattr(remote_run_dir, "upload_tree", real)
    assert find_remote(bucket).endswith("000005")
    with opened(bucket, other):
        assert steps_of(other) == [5]
    with opened(bucket, one):  # the machine that saved it still has it, and uploads it
        assert steps_of(one) == [5, 10]
    assert find_remote(bucket).endswith("000010")


def test_a_local_folder_of_another_run_is_emptied(bucket, tmp_path):
    local = tmp_path / "one"
    with opened(bucket, local):
        write_step(local, 5)
    shutil.rmtree(tmp_path / "bucket" / "run")  # the user begins again
    with opened(bucket, local):
        assert not (local / "checkpoints").exists()
    assert not paths.list_names(f"{bucket}/checkpoints")
    (aside,) = tmp_path.glob("one-before-*")
    assert (aside / "checkpoints" / "000005" / "model" / "d").read_text() == "weights 5"


def test_a_damaged_checkpoint_in_the_bucket_is_one_sentence(bucket, tmp_path):
    with opened(bucket, tmp_path / "one"):
        write_step(tmp_path / "one", 5)
    (tmp_path / "bucket" / "run" / "checkpoints" / "000005" / "model" / "d").write_text("flipped")
    with (
        pytest.raises(UserError, match=r"file://.*000005: the checkpoint is damaged: model/d"),
        opened(bucket, tmp_path / "other"),
    ):
        pass
    assert not (tmp_path / "other" / "checkpoints" / "000005").exists()


def test_one_training_at_a_time(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_locks, "SECONDS_TO_SETTLE", 0.0)
    monkeypatch.setattr(remote_locks, "SECONDS_BETWEEN_LOOKS", 0.05)
    owner = {"host": "elsewhere", "pid": 1, "started": None, "token": "theirs"}
    (tmp_path / "bucket" / "run").mkdir()
    file = tmp_path / "bucket" / "run" / "lock.json"
    file.write_text(json.dumps(owner))
    ended = threading.Event()

    def beat():
        while not ended.wait(0.3):
            os.utime(file)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"is trained by process 1 on elsewhere, .* old; wait"), remote_lock(bucket):
            pass
    finally:
        ended.set()
        thread.join()
    os.utime(file, (1, 1))  # nothing was heard of it for two minutes
    with remote_lock(bucket) as lock:
        assert json.loads(file.read_text())["host"] == socket.gethostname()
        lock.beat()
        lock.check()
        file.write_text(json.dumps(owner))  # another run has found this one silent
        lock.beat()
        with pytest.raises(UserError, match="taken over"):
            lock.check()
    assert json.loads(file.read_text()) == owner  # it stays the other's
    assert [path.name for path in file.parent.iterdir()] == ["lock.json"]


def test_a_run_that_lost_its_lock_uploads_nothing_more(bucket, tmp_path):
    local = tmp_path / "one"

    def lose_it():
        with opened(bucket, local) as remote:
            write_step(local, 5)
            remote._lock.is_lost = True

    with pytest.raises(UserError, match="taken over"):
        lose_it()
    assert not paths.list_names(f"{bucket}/checkpoints")


def test_the_local_folder_is_its_own_for_every_address(monkeypatch, tmp_path):
    monkeypatch.setenv("OQ2VL_JAX_CACHE", str(tmp_path))
    folders = {local_run_dir(url) for url in ("s3://a/run", "s3://b/run", "s3://a/run/")}
    assert len(folders) == 2
    assert all(folder.name == "run" for folder in folders)
    assert str(local_run_dir("runs/x")) == "runs/x"
    assert local_run_dir("s3://a/run", str(tmp_path / "shared")).is_relative_to(tmp_path / "shared")
