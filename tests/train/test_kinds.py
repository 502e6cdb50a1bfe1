"""Kinds of projectors, optimizers, schedules and losses: on every mesh the same, restored exactly, and what they do."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from oq2vl_jax.config import (
    EmaConfig,
    HeldOutConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    ProjectorConfig,
    ScheduleConfig,
    TrainableConfig,
)
from oq2vl_jax.errors import UserError
from oq2vl_jax.sharding import make_mesh
from oq2vl_jax.train.optimizer import make_optimizer
from oq2vl_jax.train.run import run
from oq2vl_jax.train.schedule import make_schedule
from oq2vl_jax.train.spikes import LENGTH, check_spike, empty_window
from oq2vl_jax.train.step import compile_train_step, init_train_state, state_shardings
from oq2vl_jax.trees import named_arrays
from tests.train.conftest import TINY, tiny_model
from tests.train.test_mesh import one_device_mesh, random_batch, to_global_batch, train_steps

MESH_TOLERANCE = 1e-5  # relative, loss after 5 steps on 8 devices against one; measured 4e-7
MUON_TOLERANCE = 2e-5  # absolute, on updates of size 0.2, against numpy in float64; measured 4e-6
MODEL = TINY.model


def with_projector(kind):
    return {"model": dataclasses.replace(MODEL, projector=ProjectorConfig(kind))}


SMOOTH = dataclasses.replace(TINY.optimizer, eps=1e-2)
"""Adam's 1e-8 moves a parameter with a gradient of 1e-9 by its sign, which rounding decides."""
KINDS = {
    "linear": with_projector("avg_pool_linear"),
    "shuffle": with_projector("pixel_shuffle_mlp"),
    "muon": {"optimizer": dataclasses.replace(SMOOTH, kind="muon", learning_rate=1e-3)},
    "terms": {
        "schedule": ScheduleConfig("wsd", decay_fraction=0.5, projector_warmup_fraction=0.2),
        "loss": LossConfig(z_loss=1e-3, label_smoothing=0.1),
        "ema": EmaConfig(0.9),
        "skip_spikes": True,
    },
}
KINDS["together"] = KINDS["shuffle"] | KINDS["muon"] | KINDS["terms"]
ONE_BY_ONE = [pytest.param(name, marks=() if name == "together" else pytest.mark.slow) for name in KINDS]


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_a_kind_trains_alike_on_one_device_and_on_eight(kind):
    base = dataclasses.replace(TINY, **{"optimizer": SMOOTH} | KINDS[kind])
    expected, _, _ = train_steps(base, one_device_mesh(), num_steps=5)
    for sharding in ("zero1", "fsdp"):
        config = dataclasses.replace(base, mesh=MeshConfig(1, 8, sharding))
        losses, _, _ = train_steps(config, make_mesh(config.mesh), num_steps=5)
        print(f"{kind} {sharding}: {np.abs(losses / expected - 1).max():.1e}")
        assert np.allclose(losses, expected, rtol=MESH_TOLERANCE)


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_a_kind_trained_for_2_and_2_steps_equals_4(kind, tiny_config):
    options = {"num_steps": 4, "log_every": 3, **KINDS[kind]}
    whole = run(tiny_config("whole", **options))
    assert run(tiny_config("parts", **options), stop_at_step=2) is None
    assert run(tiny_config("parts", **options)) == whole
    assert totals_of(tiny_config("parts")) == totals_of(tiny_config("whole"))  # step 2 was saved without a record


def totals_of(config):
    last = json.loads((Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()[-1])
    totals = {name: value for name, value in last.items() if name.startswith("total_")}
    assert len(totals) == 4
    return totals


def test_moments_and_averages_are_sharded_like_their_parameters():
    config = dataclasses.replace(TINY, optimizer=KINDS["muon"]["optimizer"], ema=EmaConfig(0.9))
    mesh = make_mesh(MeshConfig(1, 8))
    shardings = state_shardings(config, mesh)
    state = jax.jit(lambda key: init_train_state(key, config), out_shardings=shardings)(jax.random.key(0))
    for tree in (state.opt_state, state.ema):
        total = sum(x.nbytes for x in jax.tree.leaves(tree))
        assert sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)) < 0.2 * total


def orthogonalized(matrix):
    """Muon's five Newton-Schulz steps and the RMS of AdamW, in numpy float64."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    return 0.2 * np.sqrt(max(matrix.shape)) * x


def test_muon_takes_each_layers_matrix_by_itself_and_leaves_the_rest_to_adamw():
    model, rng = tiny_model(), np.random.default_rng(0)
    config = OptimizerConfig(1.0, 0.1, kind="muon", max_grad_norm=1e9)
    arrays = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in named_arrays(model).items()}
    gradients = jax.tree_util.tree_unflatten(jax.tree.structure(model), list(map(jnp.asarray, arrays.values())))

    def updates_of(config):
        optimizer = make_optimizer(config)
        return named_arrays(jax.jit(lambda: optimizer.update(gradients, optimizer.init(model), model)[0])())

    ours, adamw = updates_of(config), updates_of(dataclasses.replace(config, kind="adamw"))
    before = named_arrays(model)
    by_muon = {name for name, x in ours.items() if not np.array_equal(x, adamw[name])}
    assert {"projector.fc1.kernel", "decoder.layers.self_attn.q_proj.kernel", "vision.layers.mlp.fc1.kernel"} <= by_muon
    others = {"decoder.embed_tokens", "vision.patch_embedding.kernel", "vision.position_embedding"}
    assert not by_muon & (others | {name for name in ours if name.endswith(("bias", "scale"))})
    worst = 0.0
    for name in by_muon:
        gradient, weight = arrays[name].astype(np.float64), np.asarray(before[name], np.float64)
        slices = [slice(None)] if gradient.ndim == 2 else range(len(gradient))
        for i in slices:  # the first step's momentum is in the gradient's direction
            expected = -orthogonalized(gradient[i]) - 0.1 * weight[i]
            worst = max(worst, np.abs(np.asarray(ours[name])[i] - expected).max())
    print(f"muon: {len(by_muon)} matrices, largest difference {worst:.1e}")
    assert worst < MUON_TOLERANCE


def test_muon_without_a_matrix_is_one_sentence():
    from oq2vl_jax.train.parts import split_trainable

    trainable = TrainableConfig(vision=False, projector=False, decoder=False)
    nothing, _ = split_trainable(tiny_model(), dataclasses.replace(TINY, trainable=trainable))
    with pytest.raises(UserError, match="nothing trained has a matrix for it; take adamw"):
        make_optimizer(OptimizerConfig(1.0, 0.0, kind="muon")).init(nothing)


def rates(steps, part=None, optimizer=None, **options):
    config = dataclasses.replace(
        TINY, schedule=ScheduleConfig(**options), num_steps=100, optimizer=optimizer or OptimizerConfig(2.0, 0.0)
    )
    return [float(make_schedule(config, part)(step)) for step in steps]


def test_a_schedule_of_warm_up_stable_and_decay():
    wsd = {"kind": "wsd", "warmup_fraction": 0.1, "decay_fraction": 0.4}
    assert rates((0, 5, 10, 60, 70, 80, 100), **wsd) == pytest.approx([0, 1, 2, 2, 1.5, 1, 0])
    assert rates((0, 5, 10, 99), kind="constant", warmup_fraction=0.1) == pytest.approx([0, 1, 2, 2])
    assert rates((0, 50, 100), kind="wsd", warmup_fraction=0.0, decay_fraction=1.0) == pytest.approx([2, 1, 0])


def test_a_part_has_its_own_peak_and_warm_up():
    optimizer = OptimizerConfig(2.0, 0.0, projector_learning_rate=6.0)
    options = {"kind": "constant", "warmup_fraction": 0.1, "projector_warmup_fraction": 0.5, "optimizer": optimizer}
    assert rates((5, 25, 50), "projector", **options) == pytest.approx([0.6, 3, 6])
    assert rates((5, 25, 50), "decoder", **options) == pytest.approx([1, 2, 2])


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [
        (ScheduleConfig("cosine", decay_fraction=0.5), r"decay_fraction is set, but schedule\.kind is cosine"),
        (ScheduleConfig("wsd", 0.3, 0.8), "are more than the whole run together"),
        (ScheduleConfig("wsd", 0.0, 0.8, decoder_warmup_fraction=0.4), "decoder_warmup_fraction = 0.4 and"),
        (ScheduleConfig(vision_warmup_fraction=0.1), r"vision_warmup_fraction is set, but vision is not trained"),
    ],
)
def test_a_schedule_that_does_not_fit_is_one_sentence(schedule, sentence, tiny_config):
    with pytest.raises(UserError, match=sentence):
        run(tiny_config(schedule=schedule, trainable=TrainableConfig()))


@pytest.mark.parametrize(("grid", "side"), [(4, 2), (7, 2), (7, 3), (27, 2), (5, 5)])
def test_pixel_shuffle_equals_torch(grid, side):
    from oq2vl_jax.model.projector import pixel_shuffle

    features = np.random.default_rng(0).normal(size=(2, grid * grid, 3)).astype(np.float32)
    image = torch.from_numpy(features).transpose(1, 2).reshape(2, 3, grid, grid)
    end = -grid % side
    padded = torch.nn.functional.pad(image, (0, end, 0, end))
    shuffled = torch.nn.functional.pixel_unshuffle(padded, side)  # channels: feature, then row and column in a square
    expected = shuffled.reshape(2, 3, side * side, -1).permute(0, 3, 2, 1).flatten(2)
    np.testing.assert_array_equal(pixel_shuffle(jnp.asarray(features), side), expected.numpy())


def test_a_pixel_shuffle_that_no_square_gives_is_one_sentence():
    with pytest.raises(UserError, match=r"9 does not follow from a pixel shuffle of 4 x 4 patches; .* give 16, 4, 1\."):
        dataclasses.replace(MODEL, num_visual_tokens=9, projector=ProjectorConfig("pixel_shuffle_mlp"))


def test_the_average_follows_the_weights_of_the_trained_parts():
    config = dataclasses.replace(TINY, ema=EmaConfig(0.5), trainable=TrainableConfig())
    mesh = one_device_mesh()
    state, step = init_train_state(jax.random.key(0), config), compile_train_step(config, mesh)
    expected = {name: np.asarray(x, np.float64) for name, x in named_arrays(state.ema).items()}
    assert {name.split(".")[0] for name in expected} == {"projector", "decoder"}
    for i in range(6):
        state, _ = step(state, to_global_batch(random_batch(seed=i), mesh))
        kept = min(0.5, (1 + i) / (10 + i))
        model = named_arrays(state.model)
        expected = {name: kept * x + (1 - kept) * np.asarray(model[name]) for name, x in expected.items()}
    worst = max(np.abs(np.asarray(x) - expected[name]).max() for name, x in named_arrays(state.ema).items())
    assert worst < 1e-6  # measured 6e-8


def test_a_spike_lies_far_above_a_full_window():
    window, rng = empty_window(), np.random.default_rng(0)
    for i in range(LENGTH):
        is_spike, window = check_spike(window, jnp.float32(1 + 0.1 * rng.normal()), jnp.float32(2.0 + (i % 2)))
        assert not is_spike
    for loss, norm, expected in ((1.4, 2.5, False), (1.8, 2.5, True), (1.0, 6.0, True), (float("inf"), 2.0, True)):
        assert bool(check_spike(window, jnp.float32(loss), jnp.float32(norm))[0]) is expected
    _, after = check_spike(window, jnp.float32(9.0), jnp.float32(2.0))
    assert (int(after.num_seen), int(after.num_skipped)) == (LENGTH + 1, 1)
    assert float(after.losses.max()) == 9.0, "a spike enters the window: a lasting change of level is none for long"


def test_a_spike_changes_nothing_but_the_step_and_the_count():
    config = dataclasses.replace(TINY, skip_spikes=True, ema=EmaConfig(0.9))
    mesh = one_device_mesh()
    state = init_train_state(jax.random.key(0), config)
    calm = state.spikes._replace(losses=jnp.linspace(1e-3, 2e-3, LENGTH), num_seen=jnp.int32(LENGTH))
    state = state._replace(spikes=calm)
    before = [np.array(x) for x in jax.tree.leaves((state.model, state.opt_state, state.ema))]
    state, metrics = compile_train_step(config, mesh)(state, to_global_batch(random_batch(), mesh))
    after = jax.tree.leaves((state.model, state.opt_state, state.ema))
    assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))
    assert (int(state.step), int(metrics.skipped_steps)) == (1, 1)


def test_skipped_steps_are_counted_said_and_restored(tiny_config, capsys, monkeypatch):
    from oq2vl_jax.train import spikes

    monkeypatch.setattr(spikes, "NUM_SIGMAS", -1e9)  # every step of a full window is a spike
    monkeypatch.setattr(spikes, "LENGTH", 2)
    options = {"num_steps": 5, "log_every": 1, "skip_spikes": True}
    whole = run(tiny_config("whole", **options))
    assert capsys.readouterr().err.count("not applied, a spike (loss ") == 3
    assert run(tiny_config("parts", **options), stop_at_step=3) is None
    assert run(tiny_config("parts", **options)) == whole
    lines = (Path(tiny_config("parts").run_dir) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["skipped_steps"] for line in lines] == [0, 0, 1, 2, 3, 3]


def test_averaged_weights_are_kept_evaluated_and_loaded(tiny_config):
    from oq2vl_jax.checkpoint import find_checkpoint
    from oq2vl_jax.data.packing.synthetic import make_synthetic_source
    from oq2vl_jax.weights import load_weights
    from tests.train.conftest import tiny_model

    held_out = HeldOutConfig((make_synthetic_source(Path(tiny_config("data").run_dir), TINY),), 2, 1, num_samples=0)
    config = tiny_config(num_steps=4, ema=EmaConfig(0.9), trainable=TrainableConfig(), held_out=held_out)
    run(config)
    records = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    held = [(r["held_out_loss"], r["held_out_loss_ema"]) for r in records if "held_out_loss" in r]
    assert len(held) == 2
    assert held[-1][0] != held[-1][1]
    folder, like = find_checkpoint(config.run_dir), tiny_model()
    trained, averaged = (named_arrays(load_weights(folder, like, weights)) for weights in ("model", "ema"))
    differ = {name.split(".")[0] for name, x in trained.items() if not np.array_equal(x, averaged[name])}
    assert differ == {"projector", "decoder"}
    run(tiny_config("other", num_steps=1))
    with pytest.raises(UserError, match=r"holds no averaged weights; the run had no --ema\.decay"):
        load_weights(find_checkpoint(tiny_config("other").run_dir), like, "ema")
