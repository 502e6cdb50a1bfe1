"""The FLOP formula against a count of every matrix product that jax traces."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from oq2vl_jax.bench.synthetic_rows import make_rows
from oq2vl_jax.config_files import load_config
from oq2vl_jax.train import metrics
from oq2vl_jax.train.flops import Work, executed_flops, forward_flops, model_flops, typical_row
from oq2vl_jax.train.metrics import work_of
from tests.train.conftest import TINY, tiny_model


def traced_flops(jaxpr, times=1):
    """2 * M * N * K of every dot_general, scans unrolled."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted, _ = equation.params["dimension_numbers"]
            depth = np.prod([equation.invars[0].aval.shape[dim] for dim in contracted[0]])
            total += times * 2 * depth * np.prod(equation.outvars[0].aval.shape)
        repeated = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for inner in jaxprs_in_params(equation.params):
            total += traced_flops(inner, repeated)
    return total


def test_forward_formula_equals_the_traced_products():
    """A row that is one document, all its image slots filled; pooling and rotary tables are not in the formula."""
    model, config = tiny_model(), TINY.model
    tokens = jnp.zeros((1, 128), jnp.int32).at[:, :16].set(config.image_token_id)
    images = jnp.zeros((1, 4, 32, 32, 3), jnp.uint8)

    def forward(model):
        hidden = model(tokens, images, jnp.ones_like(tokens), jnp.arange(128)[None])
        return model.logits(hidden)

    traced = traced_flops(jax.make_jaxpr(forward)(model).jaxpr)
    formula = forward_flops(
        TINY, Work(tokens=128, images=4, pairs=128 * 128, labelled=0)
    )  # the reference computes all pairs
    pooling = 4 * 2 * config.vision.hidden_size * (16 * 2 + 8 * 2)  # einsum of 4x4 -> 2x2, side by side
    assert formula.total <= traced <= formula.total + 2 * pooling


def test_the_published_row_is_the_one_of_the_performance_notes():
    config = load_config("configs/pretrain.py")
    needed = model_flops(config, typical_row(config))
    teraflops = {part: round(value / 1e12, 1) for part, value in needed._asdict().items()}
    assert teraflops == {"decoder": 32.2, "logits": 5.7, "attention": 0.2, "vision": 15.4, "projector": 0.1}
    assert round(needed.total / 1e12, 1) == 53.6


def test_recomputation_and_padding_are_executed_but_not_needed():
    config = load_config("configs/pretrain.py")
    row = typical_row(config)
    needed = model_flops(config, row)
    kept, again = (executed_flops(dataclasses.replace(config, remat=remat), row, 2, 1) for remat in ("dots", "full"))
    assert kept.decoder == needed.decoder
    assert again.decoder == pytest.approx(needed.decoder * 4 / 3)
    assert kept.logits < 0.2 * needed.logits
    assert kept.vision == pytest.approx(needed.vision * (1 + 3.5 / 2 / row.images))


def test_work_counts_real_tokens_only():
    rows = make_rows(TINY, 3)
    work = work_of(rows, TINY)
    lengths = [np.bincount(segments)[1:] for segments in rows.segment_ids]
    assert work.tokens == sum(x.sum() for x in lengths)
    assert work.pairs == sum((x * (x + 1) // 2).sum() for x in lengths)
    assert work.images == sum(len(x) for x in lengths)
    assert work.labelled == work.tokens - 4 * work.images


@pytest.mark.parametrize(("kind", "is_said"), [("NVIDIA H200", False), ("NVIDIA T4", True)])
def test_a_gpu_without_a_known_peak_is_said_once(kind, is_said, tmp_path, monkeypatch, capsys):
    gpu = SimpleNamespace(platform="gpu", device_kind=kind)
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: [gpu])
    metrics.StepReporter(tmp_path, 0, load_config("configs/tiny.py"), num_processes=1).close()
    assert ("no MFU: NVIDIA T4 is not in the table" in capsys.readouterr().err) is is_said


def test_a_row_without_images_is_one_document():
    config = dataclasses.replace(TINY, data=dataclasses.replace(TINY.data, max_images=0))
    num_tokens = TINY.data.num_tokens
    assert typical_row(config) == Work(num_tokens, 0, sum(range(1, num_tokens + 1)), num_tokens)
