"""Tuning: packing while training resumed exactly, held-out rows, learning rates by part, trackers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oq2vl_jax.config import DataConfig, HeldOutConfig, OnlineConfig, OptimizerConfig, ScheduleConfig
from oq2vl_jax.data.packing.packed import PackedRows
from oq2vl_jax.data.packing.packer import PackConfig, pack_shards
from oq2vl_jax.data.packing.rows import PackedRow
from oq2vl_jax.errors import UserError
from oq2vl_jax.jobs import Execution
from oq2vl_jax.train import trackers
from oq2vl_jax.train.held_out import HeldOut, documents_of
from oq2vl_jax.train.optimizer import make_optimizer
from oq2vl_jax.train.run import run
from oq2vl_jax.train.schedule import at_learning_rates
from oq2vl_jax.trees import named_arrays
from tests.data.conftest import conversation_sample, png
from tests.data.test_instructions import conversation
from tests.train.conftest import TINY, tiny_model


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def online(tmp_path, byte_tokenizer_folder):
    """A tuning run of six steps over an instruction file that is packed while training."""
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.png").write_bytes(png(seed=i))
    entries = [
        {"id": f"{i}", "image": f"{i % 3}.png", "conversations": conversation(f"<image>\nwhat {i}?", "that")}
        for i in range(40)
    ]
    entries.append({"id": "no", "image": "none.png", "conversations": conversation("<image>", "x")})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    data = DataConfig(
        sources=(str(tmp_path / "data.json"),), num_tokens=256, max_images=4, template="chatml", num_threads=2,
        kind="online", online=OnlineConfig(str(tmp_path / "images"), byte_tokenizer_folder, window=16),
    )  # fmt: skip
    return dataclasses.replace(TINY, data=data, num_steps=6, log_every=1)


def test_a_run_that_packs_online_resumes_to_the_same_bits(online, tmp_path):
    whole = run(dataclasses.replace(online, run_dir=str(tmp_path / "whole")))
    parts = dataclasses.replace(online, run_dir=str(tmp_path / "parts"))
    assert run(parts, stop_at_step=2) is None
    assert run(parts) == whole
    assert records(tmp_path / "whole")[-1]["skipped_samples"]["image_missing"] >= 1
    losses = [[r["loss"] for r in records(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_online_packing_needs_a_tokenizer(online):
    with pytest.raises(UserError, match=r"data\.kind = online needs data\.online\.tokenizer"):
        run(dataclasses.replace(online, data=dataclasses.replace(online.data, online=OnlineConfig())))


@pytest.fixture
def held_out(tmp_path, write_shard, byte_tokenizer_folder):
    tar = write_shard(
        tmp_path / "held.tar", [conversation_sample(i, f"<image>\nWhat {i}?", "That.") for i in range(20)]
    )
    pack_shards(
        PackConfig(tar, str(tmp_path / "held"), byte_tokenizer_folder, 256, 4, 4, "chatml", execution=Execution(1))
    )
    return str(tmp_path / "held")


def test_held_out_rows_change_nothing_and_is_logged_and_shown(online, held_out, tmp_path):
    plain = run(dataclasses.replace(online, run_dir=str(tmp_path / "plain")))
    held_out_config = HeldOutConfig((held_out,), every_num_steps=2, num_batches=1, num_samples=3, max_new_tokens=4)
    config = dataclasses.replace(
        online, run_dir=str(tmp_path / "run"), held_out=held_out_config, trackers=("tensorboard",)
    )
    assert run(config) == plain
    losses = {r["step"]: r["held_out_loss"] for r in records(tmp_path / "run") if "held_out_loss" in r}
    assert list(losses) == [2, 4, 6]
    assert losses[6] < losses[2]
    page = (tmp_path / "run/samples/000006.html").read_text()
    assert page.count("<article>") == 3
    assert "data:image/jpeg;base64" in page
    assert "That." in page
    assert list((tmp_path / "run/tensorboard").glob("events*"))


def test_a_mixture_logs_rows_epochs_and_held_out_loss_by_source(
    online, held_out, tmp_path, write_shard, byte_tokenizer_folder, capsys
):
    tar = write_shard(tmp_path / "other.tar", [conversation_sample(i, f"<image>\nWhy {i}?", "So.") for i in range(30)])
    other = str(tmp_path / "other")
    pack_shards(PackConfig(tar, other, byte_tokenizer_folder, 256, 4, 4, "chatml", execution=Execution(1)))
    sources = (held_out, other)
    data = dataclasses.replace(online.data, kind="packed", sources=sources, weights=(3.0, 1.0), online=OnlineConfig())
    config = dataclasses.replace(
        online, run_dir=str(tmp_path / "run"), data=data,
        held_out=HeldOutConfig(sources, every_num_steps=6, num_batches=1, num_samples=0),
    )  # fmt: skip
    run(config, stop_at_step=2)
    run(config)
    logged = records(tmp_path / "run")
    by_step = {r["step"]: r for r in logged if "rows/held" in r}
    assert sorted(by_step) == [1, 2, 3, 4, 5, 6]
    num_rows = 6 * config.global_batch_size
    assert by_step[6]["rows/held"] + by_step[6]["rows/other"] == num_rows
    assert by_step[6]["rows/held"] == round(0.75 * num_rows)
    assert by_step[6]["epochs/other"] == by_step[6]["rows/other"] / len(PackedRows(other))
    held = [r for r in logged if "held_out_loss" in r][-1]
    assert {"held_out_loss/held", "held_out_loss/other"} < set(held)
    assert held["held_out_loss/held"] != held["held_out_loss/other"]
    assert "rows by source: held" in capsys.readouterr().out


def test_the_held_out_loss_does_not_depend_on_the_pieces_it_is_computed_in(online, held_out):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    losses = []
    for rows in (None, 2):
        held_out_config = HeldOutConfig((held_out,), num_batches=1)
        config = dataclasses.replace(online, held_out=held_out_config, rows_per_device=rows)
        losses.append(HeldOut(config, mesh).loss(tiny_model()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_held_out_rows_of_other_budgets_are_refused(online, held_out, tmp_path):
    held_out_config = HeldOutConfig((held_out,))
    data = dataclasses.replace(online.data, num_tokens=128)
    with pytest.raises(UserError, match="num_tokens is 256, the config says 128"):
        run(dataclasses.replace(online, run_dir=str(tmp_path / "x"), held_out=held_out_config, data=data))


def test_the_prompt_of_a_document_ends_before_its_first_answer():
    image = 9
    row = PackedRow(
        tokens=np.array([1, 9, 9, 5, 6, 7, 9, 9, 8, 1, 2, 3]),
        is_labelled=np.array([0, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 1], bool),
        lengths=[9, 3], images=[b"a", b"b"], keys=["x", "y"],
    )  # fmt: skip
    assert documents_of(row, image, 2) == [([1, 9, 9, 5], [6, 7], [b"a"]), ([1, 2], [3], [])]


def test_a_part_with_its_own_learning_rate_moves_by_that_rate():
    model = tiny_model()
    gradients = jax.tree.map(jnp.ones_like, model)

    def moved(**rates):
        schedule = ScheduleConfig("constant", warmup_fraction=0.0)
        config = dataclasses.replace(TINY, optimizer=OptimizerConfig(1e-2, 0.1, **rates), schedule=schedule)
        optimizer = make_optimizer(config.optimizer)

        @jax.jit
        def update(model):
            updates = optimizer.update(gradients, optimizer.init(model), model)[0]
            return at_learning_rates(updates, config, jnp.int32(0))

        return named_arrays(optax.apply_updates(model, update(model)))

    common, slow = moved(), moved(vision_learning_rate=1e-3, projector_learning_rate=0.0)
    before = named_arrays(model)
    for name, value in slow.items():
        factor = {"vision": 0.1, "projector": 0.0}.get(name.split(".")[0], 1.0)
        expected = before[name] + factor * (common[name] - before[name])
        np.testing.assert_allclose(value, expected, atol=1e-7)


def test_a_learning_rate_of_a_frozen_part_is_a_mistake(online):
    optimizer = dataclasses.replace(online.optimizer, vision_learning_rate=1e-4)
    trainable = dataclasses.replace(online.trainable, vision=False)
    with pytest.raises(UserError, match=r"vision_learning_rate is set, but vision is not trained"):
        run(dataclasses.replace(online, optimizer=optimizer, trainable=trainable))


def test_a_tracker_whose_package_is_missing_is_one_sentence(tmp_path, monkeypatch):
    def missing(*args):
        raise ImportError("No module named 'wandb'", name="wandb")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", missing)
    with pytest.raises(UserError, match=r"package wandb is missing; pip install 'oq2vl-jax\[wandb\]'"):
        trackers.open_trackers(("wandb",), tmp_path, {}, 0)
