"""What a run has spent since its first step, over restarts."""

import pytest

from oq2vl_jax.train import totals
from oq2vl_jax.train.totals import BatchCounts, Totals

COUNTS = BatchCounts(tokens=100, labelled_tokens=40, images=3, slots=128, wait_seconds=0.1, model_flops=2e9)


def test_counts_of_all_processes_add_up_and_go_on_from_a_checkpoint(monkeypatch):
    clock = [50.0]
    monkeypatch.setattr(totals.time, "monotonic", lambda: clock[0])
    first = Totals(2, {})
    first.add(COUNTS)
    clock[0] += 7
    first.pause(3)
    saved = first.state()
    assert saved == {"tokens": 200, "labelled_tokens": 80, "images": 6, "model_flops": 4e9, "seconds": 4.0}
    clock[0] += 1000  # the machine was off
    second = Totals(2, saved)
    second.add(COUNTS)
    clock[0] += 1
    assert second.record() == {
        "total_tokens": 400, "total_labelled_tokens": 160, "total_images": 12, "total_model_flops": 8e9,
        "training_seconds": pytest.approx(5.0),
    }  # fmt: skip


def test_a_checkpoint_without_totals_reports_none_rather_than_a_part():
    unknown = Totals(1, None)
    unknown.add(COUNTS)
    assert unknown.record() == {}
    assert unknown.state() is None
