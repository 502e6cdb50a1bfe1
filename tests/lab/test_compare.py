"""Comparing runs: pairs of seeds, other rows, predictions, what bad input gets, and a run against itself."""

import json
import subprocess
import sys

import numpy as np
import pytest

from oq2vl_jax.compare import CompareCommand, compare
from oq2vl_jax.config_files import to_json, with_value
from oq2vl_jax.errors import UserError
from tests.train.conftest import TINY


def write_run(folder, seed, loss, config=TINY, is_ended=True, **changes):
    for name, value in ({"seed": seed, "run_dir": str(folder)} | changes).items():
        config = with_value(config, name.replace("__", "."), value)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config))
    records = [{"step": 1, "loss": loss + 1}, {"step": 2, "loss": loss + 0.5}, {"step": 2, "held_out_loss": loss}]
    records += [{"step": 2, "loss": loss + 0.5, "parameters_sha256": "0" * 64}] if is_ended else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def runs(tmp_path):
    """Six seeds: the arm is better by 0.1, and seeds differ by much more than that."""
    rng = np.random.default_rng(0)
    for seed in range(6):
        lucky = float(rng.normal())
        write_run(tmp_path / "base" / f"seed-{seed}", seed, 3 + lucky + 0.02 * float(rng.normal()))
        loss = 2.9 + lucky + 0.02 * float(rng.normal())
        write_run(tmp_path / "arm" / f"seed-{seed}", seed, loss, optimizer__learning_rate=0.5)
    return tmp_path


def rows_of(result):
    return {row["metric"]: row for row in result["rows"]}


def test_pairs_of_seeds_find_what_their_spread_would_hide(runs):
    result = compare(CompareCommand(str(runs / "base" / "*"), str(runs / "arm" / "*"), smallest_effect=0.01))
    assert list(result["changes"]) == ["optimizer.learning_rate"]
    assert result["are_pairs"]
    row = rows_of(result)["held_out_loss"]
    assert (row["verdict"], row["how"]) == ("better", "paired")
    assert row["low"] < -0.1 < row["high"] < 0
    assert row["correlation"] > 0.99
    assert row["sign_flip_p"] == pytest.approx(2 / 64)


def test_other_rows_or_seeds_are_no_pairs(runs):
    for seed in range(6):
        write_run(runs / "data" / f"seed-{seed}", seed, 2.9, data__max_images=2)
        write_run(runs / "seeds" / f"seed-{seed + 1}", seed + 1, 2.9)
    for name in ("data", "seeds"):
        result = compare(CompareCommand(str(runs / "base" / "*"), str(runs / name / "*")))
        assert not result["are_pairs"]
        assert rows_of(result)["held_out_loss"]["how"] == "welch"
        assert rows_of(result)["held_out_loss"]["verdict"] == "undecided"


def write_predictions(folder, scores):
    (folder / "mmstar").mkdir(parents=True)
    lines = [json.dumps({"index": str(i), "score": float(s), "pictures": str(i // 2)}) for i, s in enumerate(scores)]
    (folder / "mmstar" / "predictions.jsonl").write_text("\n".join(lines) + "\n")


def test_accuracy_is_compared_over_seeds_and_questions(runs):
    rng = np.random.default_rng(1)
    hard = rng.random(300)
    for seed in range(6):
        write_predictions(runs / "results" / "base" / f"seed-{seed}", rng.random(300) * 0.5 < hard - 0.2)
        write_predictions(runs / "results" / "arm" / f"seed-{seed}", rng.random(300) * 0.5 < hard)
    command = CompareCommand(
        str(runs / "base" / "*"), str(runs / "arm" / "*"),
        predictions=(str(runs / "results" / "base" / "*"), str(runs / "results" / "arm" / "*")),
    )  # fmt: skip
    row = rows_of(compare(command))["mmstar: accuracy"]
    assert (row["verdict"], row["how"]) == ("better", "crossed")
    assert row["low"] < row["difference"] < row["high"]
    one = CompareCommand(
        str(runs / "base" / "seed-0"), str(runs / "arm" / "seed-0"),
        predictions=(str(runs / "results" / "base" / "seed-0"), str(runs / "results" / "arm" / "seed-0")),
    )  # fmt: skip
    row = rows_of(compare(one))["mmstar: accuracy"]
    assert row["mcnemar_p"] < 0.01
    assert row["how"] == "questions"
    assert "seeds were not sampled" in row["why"]
    assert rows_of(compare(one))["held_out_loss"]["verdict"] == "undecided"


def test_a_run_against_itself_differs_by_exactly_nothing(runs):
    result = compare(CompareCommand(str(runs / "base" / "*"), str(runs / "base" / "*")))
    for row in result["rows"]:
        assert (row["difference"], row["low"], row["high"], row["verdict"]) == (0, 0, 0, "equivalent")
    assert result["changes"] == result["environment"] == {}


def test_other_versions_are_named(runs):
    for name, jax in (("base", "0.10.2"), ("arm", "0.12.0")):
        entries = [{"from_step": 0, "commit": "a"}, {"from_step": 1, "commit": "c", "versions": {"jax": jax}}]
        (runs / name / "seed-0" / "environment.json").write_text(json.dumps(entries))
    result = compare(CompareCommand(str(runs / "base" / "*"), str(runs / "arm" / "*")))
    assert result["environment"] == {"versions.jax": ["0.10.2", "0.12.0"]}


def test_bad_input_is_a_sentence(runs, tmp_path):
    write_run(tmp_path / "cut", 0, 1.0, is_ended=False)
    write_run(tmp_path / "twice" / "a", 0, 1.0)
    write_run(tmp_path / "twice" / "b", 0, 1.0)
    (tmp_path / "empty").mkdir()
    base = str(runs / "base" / "*")
    for arm, words in (
        (str(tmp_path / "cut"), "the run has not ended"),
        (str(tmp_path / "twice" / "*"), "seed 0 occurs twice"),
        (str(tmp_path / "empty"), r"config\.json"),
        (str(tmp_path / "none"), "no file .*none"),
    ):
        with pytest.raises(UserError, match=words):
            compare(CompareCommand(base, arm))
    done = subprocess.run(
        [sys.executable, "-m", "oq2vl_jax.compare", base, str(runs / "arm" / "*")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "better: p < 0.001 by Holm" in done.stdout
    assert "paired by seed" in done.stdout
