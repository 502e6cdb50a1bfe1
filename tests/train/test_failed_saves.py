"""What Orbax and its event loop log of a write that failed: held for a full disk, shown for anything else."""

import errno
import logging
import os

import pytest

from oq2vl_jax.errors import UserError
from oq2vl_jax.train.failed_saves import LOGGERS, HeldErrors
from oq2vl_jax.train.run import run


@pytest.fixture
def held(monkeypatch):
    """On loggers as they are in a new process: a full disk in an earlier test leaves its filter on them."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        for attribute, value in (("filters", []), ("disabled", False), ("propagate", True)):
            monkeypatch.setattr(logger, attribute, value)
    held = HeldErrors()
    yield held
    held._is_full = False  # so that the other tests' logs are as they were
    held._records.clear()
    held.close()


@pytest.mark.parametrize("name", LOGGERS)
def test_a_full_disk_keeps_what_was_logged_before_and_after_it(held, name, caplog, tmp_path):
    logging.getLogger(name).error("a write failed")
    error = held.explained(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), tmp_path)
    logging.getLogger(name).error("another write failed")
    held.close()
    assert isinstance(error, UserError)
    assert not caplog.records


@pytest.mark.parametrize("name", LOGGERS)
def test_another_error_is_shown_with_what_was_logged_before_it(held, name, caplog, tmp_path):
    logging.getLogger(name).error("a write failed")
    assert not caplog.records
    error = RuntimeError("a mistake of ours")
    assert held.explained(error, tmp_path) is error
    logging.getLogger(name).error("another write failed")
    assert [record.getMessage() for record in caplog.records] == ["a write failed", "another write failed"]


def test_an_error_that_nobody_raises_is_shown_at_the_end(held, caplog):
    logging.getLogger("absl").error("a thread failed")
    held.close()
    assert [record.getMessage() for record in caplog.records] == ["a thread failed"]


def test_a_run_that_is_refused_leaves_no_filter_behind(tiny_config):
    before = {name: list(logging.getLogger(name).filters) for name in LOGGERS}
    run(tiny_config(num_steps=1))
    with pytest.raises(UserError, match="another configuration"):
        run(tiny_config(num_steps=1, compute_dtype="bfloat16"))
    assert {name: list(logging.getLogger(name).filters) for name in LOGGERS} == before
