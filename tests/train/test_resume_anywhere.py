"""A run that goes on with other devices, processes, sharding, workers or places keeps the undisturbed run's losses."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.train.test_processes import last_digest_of, records, together
from tests.xla_flags import devices

pytestmark = pytest.mark.slow
NUM_STEPS, CHANGE_AT = 12, 6
LOSS_TOLERANCE = 2e-5  # relative; measured: see the table that the test prints
FLAGS = ("--num-steps", str(NUM_STEPS), "--log-every", "1", "--checkpoint.every-num-steps", str(CHANGE_AT))

CHANGES = {
    "1 device": (1, ()),
    "2 devices": (2, ()),
    "4 devices": (4, ()),
    "fsdp": (8, ("--mesh.sharding", "fsdp")),
    "mesh of 8 x 1": (8, ("--mesh.data", "8", "--mesh.fsdp", "1")),
    "a row at a time on 2 devices": (2, ("--rows-per-device", "1")),
    "other workers": (8, ("--data.num-workers", "2", "--data.num-threads", "1")),
    "a moved run_dir": (8, ()),
    "into a bucket": (8, ()),
    "two processes": (8, ()),
}
TO_THE_BIT = ("other workers", "a moved run_dir", "into a bucket")
"""Changes that leave the computation as it is."""


def train(run_dir, count, *flags, cache=None):
    environment = os.environ | {"XLA_FLAGS": devices(count)} | ({"OQ2VL_JAX_CACHE": str(cache)} if cache else {})
    done = subprocess.run(
        [sys.executable, "-m", "oq2vl_jax.train", "tiny", "--run-dir", str(run_dir), *FLAGS, *flags],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(its run directory, its digest)."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    return run_dir, last_digest_of(train(run_dir, 8))


@pytest.fixture
def half(whole, tmp_path):
    """The same run as it was after CHANGE_AT steps."""
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"{NUM_STEPS:06d}")
    return tmp_path / "run"


@pytest.mark.parametrize("change", CHANGES)
def test_it_goes_on_as_if_nothing_had_changed(change, whole, half, tmp_path):
    count, flags = CHANGES[change]
    seen = half
    if change == "a moved run_dir":
        half = seen = half.rename(tmp_path / "moved")
    if change == "into a bucket":  # file:// stands for s3://; tests/remote has the store
        half, seen = f"file://{half}", half
    if change == "two processes":
        out = together(half, *FLAGS)[0]
    else:
        out = train(half, count, *flags, cache=tmp_path / "cache")
    assert f"resuming from step {CHANGE_AT}" in out
    ours, theirs = (
        {record["step"]: record["loss"] for record in records(folder) if "parameters_sha256" not in record}
        for folder in (seen, whole[0])
    )
    assert ours.keys() == theirs.keys()
    worst = max(abs(ours[step] / theirs[step] - 1) for step in range(CHANGE_AT + 1, NUM_STEPS + 1))
    print(f"{change}: losses differ by at most {worst:.1e} of themselves")
    if change in TO_THE_BIT:
        assert last_digest_of(out) == whole[1]
    assert worst < LOSS_TOLERANCE
