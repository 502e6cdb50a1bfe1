"""bench quality: what it reads, and a run that ends at the target."""

import json
import math

import pytest

from oq2vl_jax.bench import quality
from oq2vl_jax.config_files import load_config
from oq2vl_jax.data.packing.synthetic import make_synthetic_source
from oq2vl_jax.errors import UserError


def test_the_first_evaluation_at_the_target_counts(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert quality.where_reached(metrics, 1.0) == (math.inf, math.inf, math.inf)
    records = [{"step": 20, "loss": 0.1, "training_seconds": 2.0}, {"step": 20, "held_out_loss": 1.5},
               {"step": 40, "loss": 0.1, "training_seconds": 4.0}, {"step": 40, "held_out_loss": 1.0},
               {"step": 60, "loss": 0.1, "training_seconds": 6.0}, {"step": 60, "held_out_loss": 0.5}]  # fmt: skip
    metrics.write_text("\n".join(map(json.dumps, records[:3])) + '\n{"step": 40, "held')
    assert quality.where_reached(metrics, 1.0) == (math.inf, math.inf, 1.5)
    metrics.write_text("\n".join(map(json.dumps, records)) + "\n")
    assert quality.where_reached(metrics, 1.0) == (40, 4.0, 1.0)


def test_a_recipe_that_seldom_reaches_the_target_has_no_median():
    never, reached = quality.Reached(math.inf, math.inf, 2.0), quality.Reached(40, 4.0, 1.0)
    row = quality.summary("as configured", [reached, never, never], 1.0)
    assert (row["reached"], row["seeds"], row["steps"], row["least steps"], row["most seconds"]) == (
        1,
        3,
        None,
        40,
        None,
    )
    assert quality.summary("as configured", [reached, reached, never], 1.0)["seconds"] == 4.0


def test_runs_end_at_the_target(tmp_path):
    rows = make_synthetic_source(tmp_path, load_config("configs/tiny.py"))
    options = quality.Quality("configs/tiny.py", target=99.0, held_out=rows, num_seeds=1, every=5, num_batches=1,
                              against=("optimizer.learning_rate=0.001",))  # fmt: skip
    rows = quality.measure(options)
    assert [row["recipe"] for row in rows] == ["as configured", "optimizer.learning_rate=0.001"]
    assert all(row["steps"] == 5 and row["seconds"] > 0 for row in rows)


def test_mistakes_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="a folder of held-out rows is needed"):
        quality.measure(quality.Quality("configs/tiny.py", target=1.0))
    with pytest.raises(UserError, match=r"ended with exit code 2: error: data.sources: .*has no manifest.json"):
        quality.measure(quality.Quality("configs/tiny.py", target=1.0, held_out=str(tmp_path / "none"), num_seeds=1))
