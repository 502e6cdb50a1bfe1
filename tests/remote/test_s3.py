"""Data, run directory and checkpoints in an S3 store (moto's server, by s3fs): the same run as with local folders."""

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time

import fsspec
import pytest

from oq2vl_jax.config_files import load_config
from oq2vl_jax.data.packing.synthetic import make_synthetic_source
from oq2vl_jax.errors import UserError
from oq2vl_jax.train.run import run
from tests.remote.endpoint import BUCKET, endpoint, environment

NUM_STEPS = 4


@pytest.fixture(scope="module")
def store():
    with endpoint() as door:
        yield door


@pytest.fixture
def s3(store, monkeypatch, tmp_path):
    """The file system of this process, and the endpoint's door."""
    import s3fs

    for name, value in environment(store, str(tmp_path / "cache")).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    store.reset()
    yield fsspec.filesystem("s3", use_listings_cache=False)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(the configuration of a short run of local rows, their folder, the digest that the run ends with)."""
    folder = tmp_path_factory.mktemp("local")
    config = load_config("tiny")
    source = make_synthetic_source(folder / "data", config)
    config = dataclasses.replace(
        config, num_steps=NUM_STEPS, run_dir=str(folder / "run"), log_every=1,
        data=dataclasses.replace(config.data, kind="packed", sources=(source,)),
        checkpoint=dataclasses.replace(config.checkpoint, every_num_steps=2),
    )  # fmt: skip
    return config, source, run(config)


def in_bucket(config, run_dir):
    data = dataclasses.replace(config.data, sources=(f"s3://{BUCKET}/packed",))
    return dataclasses.replace(config, data=data, run_dir=f"s3://{BUCKET}/{run_dir}")


def test_a_run_in_a_bucket_is_the_run_of_local_folders(s3, tiny, tmp_path, monkeypatch, capsys):
    config, source, digest = tiny
    s3.put(f"{source}/", f"{BUCKET}/packed/", recursive=True)
    remote = in_bucket(config, "runs/a")
    assert run(remote, stop_at_step=2) is None
    monkeypatch.setenv("OQ2VL_JAX_CACHE", str(tmp_path / "another machine"))
    assert run(remote) == digest
    out = capsys.readouterr().out
    assert "resuming from step 2" in out
    assert f"checkpoint s3://{BUCKET}/runs/a/checkpoints/000004" in out
    names = {name.removeprefix(f"{BUCKET}/runs/a/") for name in s3.find(f"{BUCKET}/runs/a")}
    assert {"config.json", "metrics.jsonl", "environment.json", "run_id"} <= names
    assert "lock.json" not in names
    tuned = dataclasses.replace(config, run_dir=str(tmp_path / "tuned"), init_from=f"s3://{BUCKET}/runs/a@4")
    local = dataclasses.replace(tuned, run_dir=str(tmp_path / "tuned locally"), init_from=config.run_dir)
    assert run(tuned) == run(local)


def test_rows_that_were_swapped_in_the_bucket_are_refused(s3, tiny):
    config, source, _ = tiny
    s3.put(f"{source}/", f"{BUCKET}/swapped/", recursive=True)
    s3.pipe(f"{BUCKET}/swapped/rows-00000.array_record", b"other" * 1000)
    data = dataclasses.replace(config.data, sources=(f"s3://{BUCKET}/swapped",))
    with pytest.raises(UserError, match=r"s3://bucket/swapped/rows-00000.array_record is not what was packed"):
        run(dataclasses.replace(config, data=data, run_dir=f"s3://{BUCKET}/runs/swapped"))


def command(config, run_dir):
    return [
        sys.executable, "-m", "oq2vl_jax.train", "tiny", "--num-steps", "20", "--run-dir", f"s3://{BUCKET}/{run_dir}",
        "--data.kind", "packed", "--data.sources", f"s3://{BUCKET}/packed", "--checkpoint.every-num-steps", "4",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    config, _, _ = tiny
    return run(dataclasses.replace(config, num_steps=20, run_dir=str(tmp_path_factory.mktemp("whole") / "run")))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "every tenth fails", "slow", "away for a minute"])
def test_whatever_happens_to_the_run_or_the_store_it_ends_as_undisturbed(fault, s3, store, tiny, undisturbed, tmp_path):
    """Killed: twice at random, each time on another machine."""
    config, source, _ = tiny
    s3.put(f"{source}/", f"{BUCKET}/packed/", recursive=True)
    name = f"runs/{fault.replace(' ', '-')}"
    rng = random.Random(fault)
    if fault == "killed":
        for i in range(2):
            started = environment(store, str(tmp_path / f"machine {i}"))
            process = subprocess.Popen(command(config, name), env=started, start_new_session=True)
            time.sleep(rng.uniform(8, 20))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    store.fail_every, store.lag = (10 if "tenth" in fault else 0), (0.5 if fault == "slow" else 0.0)
    started = environment(store, str(tmp_path / "the last machine"), patience=300)
    process = subprocess.Popen(
        command(config, name), env=started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if "away" in fault:
        time.sleep(6)
        store.is_closed = True
        time.sleep(60)
        store.is_closed = False
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert undisturbed in out
    if "away" in fault:
        assert "asking again" in err


@pytest.mark.slow
@pytest.mark.parametrize("fault", [{"status": 403}, {"status": 503}, {"is_closed": True}])
def test_a_store_that_is_away_for_good_is_one_sentence(fault, s3, store, tiny, undisturbed, tmp_path):
    """While the run trains; the checkpoint stays on this machine, and the same command uploads it."""
    config, source, _ = tiny
    s3.put(f"{source}/", f"{BUCKET}/packed/", recursive=True)
    name = f"runs/away-{'-'.join(map(str, fault.values()))}"
    started = environment(store, str(tmp_path / "cache"), patience=10)
    process = subprocess.Popen(
        command(config, name), env=started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step 10/"):
            vars(store).update(fault)
    err = process.stderr.read()
    assert process.wait() == 2, err
    assert "Traceback" not in err
    store.reset()
    again = subprocess.run(command(config, name), env=started, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    resumed = re.search(r"resuming from step (\d+)", again.stdout)
    assert resumed, again.stdout
    assert int(resumed[1]) >= 12, "the checkpoint that was not uploaded is still here"
    assert undisturbed in again.stdout
