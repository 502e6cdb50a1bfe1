"""Adapters: they begin as their base, train alone, and are saved, resumed, merged and refused as they should be."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oq2vl_jax.checkpoint import find_checkpoint, saved_shapes
from oq2vl_jax.config import EmaConfig, HeldOutConfig, LoraConfig
from oq2vl_jax.errors import UserError
from oq2vl_jax.model.adapters import merged, with_adapters, without_adapters
from oq2vl_jax.train.gradients import loss_and_gradients
from oq2vl_jax.train.loss import loss
from oq2vl_jax.train.parts import split_trainable
from oq2vl_jax.train.run import describe, run
from oq2vl_jax.train.step import init_train_state
from oq2vl_jax.trees import from_named_arrays, named_arrays
from oq2vl_jax.weights import load_adapters, load_weights
from tests.train.conftest import TINY, tiny_model
from tests.train.test_mesh import one_device_mesh, random_batch

EVERYWHERE = LoraConfig(rank=4, alpha=8.0, targets=("vision", "projector", "decoder"))
GRADIENT_TOLERANCE = 1e-5  # of the largest of an adapter, against the chain rule in float64; measured 2.4e-6
MERGED_TOLERANCE = 5e-6  # of the largest hidden state; measured 1.2e-6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The run directory of a base, trained for two steps."""
    run_dir = str(tmp_path_factory.mktemp("base") / "base")
    run(dataclasses.replace(TINY, run_dir=run_dir, num_steps=2))
    return run_dir


@pytest.fixture
def adapted(tiny_config, base):
    def make(run_dir="lora", lora=EVERYWHERE, **changes):
        return tiny_config(run_dir, **({"num_steps": 4, "init_from": base, "lora": lora} | changes))

    return make


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """(run directory, parameters_sha256) of four steps of adapters, with held-out samples and an average."""
    from oq2vl_jax.data.packing.synthetic import make_synthetic_source

    folder = tmp_path_factory.mktemp("trained")
    held_out = HeldOutConfig((make_synthetic_source(folder / "rows", TINY),), 4, 1, 2)
    config = dataclasses.replace(
        TINY, run_dir=str(folder / "run"), init_from=base, lora=EVERYWHERE, num_steps=4, ema=EmaConfig(0.9),
        held_out=held_out,
    )  # fmt: skip
    return config.run_dir, run(config)


def random_adapters(model, seed=1):
    """The model with random values in place of B = 0."""
    rng, arrays = np.random.default_rng(seed), named_arrays(model)
    of_b = {
        name: (0.05 * rng.normal(size=x.shape)).astype(np.float32)
        for name, x in arrays.items()
        if name.endswith("lora_b")
    }
    return from_named_arrays(model, arrays | {name: jnp.asarray(x) for name, x in of_b.items()})


def hidden_of(model, batch):
    run_model = jax.jit(lambda model, batch: model(batch.tokens, batch.images, batch.segment_ids, batch.positions))
    return run_model(model, batch)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_start_equals_its_base_exactly(dtype):
    config = dataclasses.replace(TINY, lora=EVERYWHERE, compute_dtype=dtype)
    model, batch = tiny_model(), random_batch(rows=2)
    start = with_adapters(model, config.lora, jax.random.key(3), base_dtype=dtype)
    rounded = jax.tree.map(lambda x, like: like.astype(x.dtype), without_adapters(start), model)
    assert np.array_equal(hidden_of(start, batch), hidden_of(rounded, batch))
    names = {name.rpartition(".")[0] for name in named_arrays(start) if name.endswith("lora_a")}
    assert {"vision.layers.mlp.fc1", "projector.fc2", "decoder.layers.self_attn.o_proj"} <= names
    assert len(names) == 6 + 2 + 7  # every linear layer but the patch embedding


def test_gradients_of_adapters_follow_from_those_of_the_merged_weights():
    config = dataclasses.replace(TINY, lora=EVERYWHERE)
    model = random_adapters(with_adapters(tiny_model(), config.lora, jax.random.key(3)))
    batch = jax.tree.map(jnp.asarray, random_batch())
    value, gradients = jax.jit(lambda *of: loss_and_gradients(*of, config, one_device_mesh()))(model, batch)
    whole = merged(model)

    def mean_loss(whole):
        total, number = loss(whole, batch)
        return total / number

    expected_value, dense = jax.jit(jax.value_and_grad(mean_loss))(whole)
    assert abs(value / expected_value - 1) < 1e-6
    dense, arrays = named_arrays(dense), named_arrays(model)
    worst = 0.0
    for name, gradient in named_arrays(gradients).items():
        layer, _, which = name.rpartition(".")
        of_kernel = np.asarray(dense[f"{layer}.kernel"], np.float64)
        a, b = (np.asarray(arrays[f"{layer}.{one}"], np.float64) for one in ("lora_a", "lora_b"))
        rule = of_kernel @ b.swapaxes(-1, -2) if which == "lora_a" else a.swapaxes(-1, -2) @ of_kernel
        rule = EVERYWHERE.alpha / 4 * rule
        worst = max(worst, np.abs(gradient - rule).max() / np.abs(rule).max())
    print(f"adapters: {len(named_arrays(gradients))} gradients, largest relative difference {worst:.1e}")
    assert worst < GRADIENT_TOLERANCE


def test_only_adapters_have_moments_and_the_base_is_stored_in_the_compute_type():
    config = dataclasses.replace(TINY, lora=LoraConfig(rank=4), compute_dtype="bfloat16")
    state = jax.eval_shape(lambda: init_train_state(jax.random.key(0), config))
    trained = named_arrays(split_trainable(state.model, config)[0])
    assert set(trained) == {name for name in named_arrays(state.model) if "lora_" in name}
    assert all(name.startswith("decoder.layers.") for name in trained)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * sum(x.size for x in trained.values()) + 1
    types = {name: str(x.dtype) for name, x in named_arrays(state.model).items()}
    assert types["decoder.embed_tokens"] == types["vision.layers.mlp.fc1.kernel"] == "bfloat16"
    assert types["decoder.norm.scale"] == types["decoder.layers.self_attn.q_proj.lora_a"] == "float32"


def test_two_steps_and_two_more_equal_four_and_the_base_stays(adapted, base, trained):
    before = named_arrays(load_weights(find_checkpoint(base), tiny_model()))
    before = {name: np.asarray(x) for name, x in before.items()}
    assert run(adapted("parts", ema=EmaConfig(0.9)), stop_at_step=2) is None
    assert run(adapted("parts", ema=EmaConfig(0.9))) == trained[1]
    folder = find_checkpoint(trained[0])
    for weights in ("model", "ema"):
        assert all("lora_" in name for name in saved_shapes(folder, weights))
        adapters = load_adapters(folder, weights)
        for name, x in named_arrays(load_weights(folder, tiny_model(), weights)).items():
            adapter = adapters.get(name)
            by_hand = before[name] if adapter is None else before[name] + 2.0 * (adapter.a @ adapter.b)
            np.testing.assert_allclose(x, by_hand, atol=1e-7)
            assert (name in adapters) != np.array_equal(x, before[name])


def test_merged_weights_compute_what_the_adapters_do():
    model = random_adapters(with_adapters(tiny_model(), EVERYWHERE, jax.random.key(3)))
    batch = random_batch(rows=2)
    ours, theirs = hidden_of(model, batch), hidden_of(merged(model), batch)
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"merged: relative error {error:.1e}")
    assert error < MERGED_TOLERANCE


def test_adapters_on_adapters(adapted, trained):
    second = adapted("second", init_from=trained[0], lora=LoraConfig(rank=2), num_steps=2)
    run(second)
    first = named_arrays(load_weights(find_checkpoint(trained[0]), tiny_model()))
    for name, x in named_arrays(load_weights(find_checkpoint(second.run_dir), tiny_model())).items():
        assert np.array_equal(x, first[name]) == (not name.startswith("decoder.layers") or "kernel" not in name)


def test_another_base_is_refused_and_a_moved_one_is_found(trained, base, tmp_path):
    run_dir = shutil.copytree(trained[0], tmp_path / "run")
    folder = find_checkpoint(str(run_dir))
    metadata, config = folder / "base" / "metadata", folder / "config" / "metadata"
    recorded = json.loads(metadata.read_text())
    metadata.write_text(json.dumps(recorded | {"checkpoint": "/gone"}))
    assert load_weights(folder, tiny_model())  # where init_from says
    config.write_text(config.read_text().replace(base, "/gone/too"))
    with pytest.raises(UserError, match=r"holds adapters of /gone, which is gone; bring that checkpoint back"):
        load_weights(folder, tiny_model())
    metadata.write_text(json.dumps(recorded | {"checkpoint": str(shutil.copytree(base, tmp_path / "copy"))}))
    assert load_weights(folder, tiny_model())  # copied
    metadata.write_text(json.dumps(recorded | {"digest": "of other weights"}))
    with pytest.raises(UserError, match="has other weights; they would not fit"):
        load_weights(folder, tiny_model())
    metadata.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(folder, tiny_model())


def test_held_out_losses_and_samples_are_those_of_the_adapted_model(trained):
    records = [json.loads(line) for line in (Path(trained[0]) / "metrics.jsonl").read_text().splitlines()]
    assert {"held_out_loss", "held_out_loss_ema"} <= set().union(*records)
    assert list(Path(trained[0], "samples").glob("*.html"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": None}, "init_from is not: adapters change the weights of a checkpoint"),
        ({"init_parts": ("decoder",)}, "the base of adapters is a whole checkpoint"),
        ({"lora": LoraConfig(rank=4, kind="dora")}, r"lora.kind = dora is not here; lora is \(no DoRA, no quantised"),
        ({"lora": LoraConfig(rank=4, targets=())}, "lora.targets names no part"),
        ({"lora": LoraConfig(alpha=16.0)}, "lora.alpha, targets or kind is set, but lora.rank is not"),
        ({"lora": LoraConfig(rank=0)}, "rank must be"),
    ],
)
def test_settings_that_cannot_run_are_a_sentence(adapted, changes, message):
    with pytest.raises(UserError, match=message):
        run(adapted("no", **changes))


def test_the_dry_run_counts_adapters(adapted):
    text = describe(adapted(lora=LoraConfig(rank=4)))
    widths = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    assert f"frozen; {2 * 4 * sum(map(sum, widths)):,} of adapters" in text
    assert text.count("of adapters") == 1
