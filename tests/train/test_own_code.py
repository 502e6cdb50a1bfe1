"""Code of the researcher's own: from a file or handed over, recorded, refused when it changed."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oq2vl_jax import own_code
from oq2vl_jax.checkpoint import find_checkpoint
from oq2vl_jax.config import EmaConfig, LossConfig, MeshConfig, ProjectorConfig
from oq2vl_jax.config_files import with_value
from oq2vl_jax.errors import UserError
from oq2vl_jax.generate.generator import Generator
from oq2vl_jax.generate.reply import SamplingOptions
from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
from oq2vl_jax.train.checks import check_config
from oq2vl_jax.train.loss import loss as our_loss
from oq2vl_jax.train.run import run, with_own_code
from tests.data.conftest import png
from tests.train.conftest import TINY

PROJECTOR = "docs/examples/own_projector.py:MaxPool"
FILE = """
def loss(model, batch, compute):
    from oq2vl_jax.train.loss import loss
    total, number = loss(model, batch, compute)
    return 2 * total, number
"""


def losses(run_dir):
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weighted_by(weight, model, batch, compute):
    total, number = our_loss(model, batch, compute)
    return weight * total, number


def doubled(model, batch, compute):
    total, number = our_loss(model, batch, compute)
    return 2 * total, number


def test_a_loss_from_a_file_is_recorded_and_a_changed_file_is_refused(tiny_config, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    options = {"num_steps": 2, "log_every": 1}
    config = tiny_config(loss=LossConfig(own=f"{file}:loss"), **options)
    run(config, stop_at_step=1)
    plain = tiny_config("plain", **options)
    run(plain, stop_at_step=1)
    assert losses(config.run_dir)[0] == pytest.approx(2 * losses(plain.run_dir)[0], rel=1e-6)
    recorded = json.loads((Path(config.run_dir) / "config.json").read_text())["loss"]["own"]
    assert recorded.startswith(f"{file}:loss#")
    with pytest.raises(UserError, match=r"was begun with loss\.own = .*mine\.py:loss#.*, and now it is ours"):
        run(dataclasses.replace(config, loss=LossConfig()))
    moved = tmp_path / "elsewhere.py"
    file.rename(moved)
    run(dataclasses.replace(config, loss=LossConfig(own=f"{moved}:loss")))  # the same bytes
    moved.write_text(FILE.replace("2 *", "3 *"))
    with pytest.raises(UserError, match="go on with the file as it was"):
        run(dataclasses.replace(config, loss=LossConfig(own=f"{moved}:loss")))
    with pytest.raises(UserError, match="has changed since it was recorded"):
        own_code.record(recorded.replace(str(file), str(moved)))


def test_functions_handed_to_run_replace_ours(tiny_config):
    def sgd(config):
        return optax.sgd(1.0)

    def halved(peak, warmup_steps, config):
        return lambda step: 0.5 * peak

    options = {"num_steps": 2, "log_every": 1}
    first, second = tiny_config("a", **options), tiny_config("b", **options)
    own = {"loss": doubled, "optimizer": sgd, "schedule": halved}
    digest = run(first, **own)
    lines = (Path(first.run_dir) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["learning_rate"] for line in lines[:2]] == pytest.approx([1.5e-3] * 2)
    recorded = json.loads((Path(first.run_dir) / "config.json").read_text())
    assert recorded["loss"]["own"].split("#")[0].endswith("test_own_code.py:doubled")
    assert recorded["optimizer"]["own"].split("#")[0].endswith("test_own_code.py:sgd*")
    assert run(second, **own, stop_at_step=1) is None
    with pytest.raises(UserError, match=r"was begun with loss\.own"):
        run(second, optimizer=sgd, schedule=halved)
    assert run(second, **own) == digest


@pytest.mark.parametrize("sharding", ["zero1", "fsdp"])
def test_a_teacher_lies_whole_on_every_device(sharding, tiny_config):
    """The loss of docs/examples/own_loss.py, on the 8 devices of the tests; a model is its own teacher."""
    import runpy

    distillation = runpy.run_path("docs/examples/own_loss.py")["distillation"]
    config = tiny_config(num_steps=1, log_every=1, mesh=MeshConfig(sharding=sharding))
    teacher = jax.device_get(OpenQwen2VL(jax.random.key(config.seed), config.model))
    run(config, loss=jax.tree_util.Partial(distillation, teacher))
    ours = tiny_config("plain", num_steps=1, log_every=1)
    run(ours)
    entropy = 2 * losses(config.run_dir)[0] - losses(ours.run_dir)[0]
    assert 5.0 < entropy < np.log(TINY.model.decoder.vocab_size)  # of the initial model's own probabilities


def test_what_a_file_alone_does_not_give_is_handed_over_again(tiny_config):
    config = tiny_config(num_steps=2, log_every=1)
    assert run(config, loss=partial(weighted_by, 2.0), stop_at_step=1) is None
    recorded = json.loads((Path(config.run_dir) / "config.json").read_text())["loss"]["own"]
    assert recorded.split("#")[0].endswith("test_own_code.py:weighted_by*")
    with pytest.raises(UserError, match=r"was begun with loss\.own"):
        run(config, loss=partial(weighted_by, 3.0))
    own_code._given.clear()
    with pytest.raises(UserError, match="was handed to run in Python, and its file alone does not give it"):
        own_code.record(recorded)
    assert own_code.same(own_code.hand_over(jax.checkpoint(doubled)).replace("*", ""), own_code.hand_over(doubled))


def test_a_file_is_read_once_before_jax_traces_and_may_change_while_a_run_goes_on(tiny_config, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "import jax.numpy as jnp\n"
        "from oq2vl_jax.model.projector import AvgPoolMlp\n"
        "SCALE = 2 * jnp.ones(())\n"
        "@dataclass\n"
        "class Options:\n"
        "    scale: float = 1.0\n"
        "class Scaled(AvgPoolMlp):\n"
        "    def __call__(self, reduced):\n"
        "        return SCALE * super().__call__(reduced)\n"
    )
    model = dataclasses.replace(TINY.model, projector=ProjectorConfig(own=f"{file}:Scaled"))
    config = with_own_code(tiny_config(num_steps=1, model=model), {})
    file.write_text("changed")
    assert callable(own_code.load(config.model.projector.own))
    from oq2vl_jax.train.flops import model_flops
    from oq2vl_jax.train.metrics import Work

    assert model_flops(config, Work(1, 1, 1, 1)).projector > 0
    with pytest.raises(UserError, match="has changed since it was recorded"):
        run(config)


@pytest.mark.parametrize(
    ("field", "content", "sentence"),
    [
        ("loss", "mine = 3", "mine is int, expected a function or a class"),
        ("loss", "def mine(model, batch, compute): return 1.0", "the loss returns no pair"),
        ("optimizer", "def mine(config): return 3", "returns no optax transformation, but int"),
        ("projector", "class mine:\n    def __init__(self, key, config): pass", "lacks reduce or __call__"),
        ("projector", "from flax import nnx\nclass mine(nnx.Module):\n    def __init__(self, key, config):\n"
         "        self.map = nnx.Linear(2, 2, rngs=nnx.Rngs(0))\n    def reduce(self, x): return x\n"
         "    def __call__(self, x): return x", "a parameter does not name its axes"),
    ],
)  # fmt: skip
def test_code_of_another_form_is_one_sentence(field, content, sentence, tiny_config, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(content)
    key = {"projector": "model.projector.own"}.get(field, f"{field}.own")
    with pytest.raises(UserError, match=sentence):
        run(with_value(tiny_config(num_steps=1), key, f"{file}:mine"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optimizer.own": "a.py:b", "optimizer.kind": "muon"}, r"optimizer\.own replaces optimizer\.kind"),
        ({"optimizer.muon_momentum": 0.5}, "muon_momentum is set, but optimizer.kind is not muon"),
        ({"schedule.own": "a.py:b", "schedule.kind": "wsd"}, r"schedule\.own replaces schedule\.kind"),
        (
            {"model.projector.own": "a.py:b", "model.projector.kind": "avg_pool_linear"},
            "own replaces model.projector.kind",
        ),
        ({"init_from": "x", "init_parts": ()}, "init_parts names no part"),
        ({"init_from": "x", "init_parts": ("vision",), "init_optimizer": True}, "init_parts lacks some of them"),
    ],
)
def test_a_setting_without_effect_is_refused(changes, sentence, tiny_config):
    config = tiny_config()
    for key, value in changes.items():
        config = with_value(config, key, value)
    with pytest.raises(UserError, match=sentence):
        check_config(config, 8)


def test_moments_and_averages_have_digests_of_their_own(tiny_config):
    trunk = tiny_config("trunk", num_steps=1, ema=EmaConfig(0.9))
    run(trunk)
    folder = find_checkpoint(trunk.run_dir)
    file = max((folder / "optimizer").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"the checkpoint is damaged: optimizer/"):
        run(tiny_config("branch", num_steps=1, init_from=trunk.run_dir, init_optimizer=True))
    shutil.rmtree(folder / "ema")
    Generator(trunk.run_dir)  # the trained weights need no average
    with pytest.raises(UserError, match=r"the checkpoint is damaged: ema/"):
        Generator(trunk.run_dir, weights="ema")


def test_a_checkpoint_that_a_configuration_adopts_starts_no_code(tiny_config):
    model = dataclasses.replace(TINY.model, projector=ProjectorConfig(own=PROJECTOR))
    trunk = tiny_config("trunk", num_steps=1, model=model)
    run(trunk)
    bare = tiny_config("bare", num_steps=1, model=None, init_from=trunk.run_dir)
    with pytest.raises(UserError, match=r"was trained with .*MaxPool#.*; bind a model that names it"):
        run(bare)
    plain = tiny_config("plain", num_steps=1)
    run(plain)
    tuned = tiny_config("tuned", num_steps=2, model=None, init_from=plain.run_dir)
    run(tuned, stop_at_step=1)
    shutil.rmtree(plain.run_dir)
    run(tuned)  # resuming needs the trunk no more


def test_a_loss_with_arrays_of_its_own_gets_them_on_every_device(tiny_config):
    def weighted(factor, model, batch, compute):
        total, number = our_loss(model, batch, compute)
        return factor["factor"] * total, number

    config = tiny_config(num_steps=1, log_every=1)  # on the 8 devices of the tests
    run(config, loss=jax.tree_util.Partial(weighted, {"factor": jnp.float32(3.0)}))
    other = tiny_config("plain", num_steps=1, log_every=1)
    run(other)
    assert losses(config.run_dir)[0] == pytest.approx(3 * losses(other.run_dir)[0], rel=1e-6)


def test_a_projector_in_a_file_trains_resumes_answers_and_is_refused_by_the_export(tiny_config):
    from convert.to_hf import ToHFConfig, export

    model = dataclasses.replace(TINY.model, projector=ProjectorConfig(own=PROJECTOR))
    options = {"num_steps": 2, "model": model}
    whole = run(tiny_config("whole", **options))
    config = tiny_config("parts", **options)
    run(config, stop_at_step=1)
    assert run(config) == whole
    with pytest.raises(UserError, match=r"was trained with .*own_projector\.py:MaxPool#.*; name that file"):
        Generator(config.run_dir)
    generator = Generator(config.run_dir, projector=PROJECTOR)
    assert isinstance(generator.ask("what?", [png()], SamplingOptions(4)), str)
    with pytest.raises(UserError, match=r"and --projector is .*own_optimizer\.py:lion"):
        Generator(config.run_dir, projector="docs/examples/own_optimizer.py:lion")
    with pytest.raises(UserError, match="to_hf writes the projectors avg_pool_mlp, avg_pool_linear, pixel_shuffle_mlp"):
        export(ToHFConfig(config.run_dir, str(Path(config.run_dir).parent / "exported")))
    plain = tiny_config("plain", num_steps=1)
    run(plain)
    with pytest.raises(UserError, match="its projector is avg_pool_mlp; leave out --projector"):
        Generator(plain.run_dir, projector=PROJECTOR)


@pytest.mark.parametrize(
    ("content", "name", "sentence"),
    [
        (None, "loss", r"cannot be read \(No such file or directory\); it should define loss"),
        ("def los(): pass", "loss", r"has no loss \(did you mean 'los'\?\)"),
        ("1 / 0", "loss", "ZeroDivisionError: division by zero"),
        ("", "loss:", "names no code; expected FILE.py:NAME"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(content, name, sentence, tmp_path):
    file = tmp_path / "mine.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=sentence):
        own_code.load(f"{file}:{name}")


def test_a_projector_that_does_not_fit_is_one_sentence(tmp_path):
    from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL

    file = tmp_path / "mine.py"
    file.write_text(
        "from oq2vl_jax.model.projector import AvgPoolMlp\n"
        "class Half(AvgPoolMlp):\n"
        "    def reduce(self, patches):\n"
        "        return super().reduce(patches)[:, ::2]\n"
    )
    model = dataclasses.replace(TINY.model, projector=ProjectorConfig(own=f"{file}:Half"))
    with pytest.raises(UserError, match=r"makes \(2, 2, 64\) of \(2, 16, 32\); expected \(2, 4, 64\)"):
        OpenQwen2VL(jax.random.key(0), model)


def test_terms_beside_a_loss_of_ones_own_are_refused(tiny_config):
    with pytest.raises(UserError, match=r"loss\.own replaces loss\.z_loss"):
        run(tiny_config(loss=LossConfig(z_loss=1e-4)), loss=doubled)
