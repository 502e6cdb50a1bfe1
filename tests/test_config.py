"""Configurations: every file of configs/ loads and shapes up, and every typo is met with a hint."""

import ast
import dataclasses
import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import pytest

from oq2vl_jax.config import ModelConfig, TrainConfig, VisionConfig
from oq2vl_jax.config_files import flatten, from_dict, load_config, names_of_role, to_json, with_changes
from oq2vl_jax.errors import UserError, run_command
from oq2vl_jax.lab.definition import load_ablation
from oq2vl_jax.lab.plan import make_plan
from oq2vl_jax.train.step import init_train_state

CONFIGS = sorted(str(path) for path in Path("configs").glob("*.py"))
DEFINITIONS = sorted(Path("configs/ablations").glob("*.py"))
COMMANDS = (
    "oq2vl_jax.train",
    "oq2vl_jax.data.pack",
    "oq2vl_jax.curate.score",
    "oq2vl_jax.curate.filter",
    "oq2vl_jax.curate.reshard",
    "oq2vl_jax.curate.overlap",
    "oq2vl_jax.compare",
    "oq2vl_jax.ablate",
    "oq2vl_jax.data.inspect",
    "oq2vl_jax.bench",
    "oq2vl_jax.generate",
    "oq2vl_jax.eval",
    "oq2vl_jax.serve",
    "oq2vl_jax.demo.easy_vqa",
    "oq2vl_jax.demo.report",
    "convert.from_hf",
    "convert.from_clip",
    "convert.from_prismatic",
    "convert.to_hf",
    "convert.to_prismatic",
    "convert.ask_hf",
)
MAX_HELP_SECONDS = 2.0  # measured 0.3


def children_seconds():
    """CPU time of the processes started so far; other tests beside this one do not count."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_loads_and_eval_shapes(path):
    config = load_config(path)
    state = jax.eval_shape(lambda: init_train_state(jax.random.key(0), config))
    assert sum(x.size for x in jax.tree.leaves(state.model)) > 0
    assert from_dict(TrainConfig, json.loads(to_json(config)), where="json") == config


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_opens_with_its_command_and_holds_values_only(path):
    tree = ast.parse(Path(path).read_text())
    assert f"python -m oq2vl_jax.train {path}" in ast.get_docstring(tree)
    allowed = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign)
    assert all(isinstance(node, allowed) for node in tree.body)


@pytest.mark.parametrize("path", DEFINITIONS, ids=str)
def test_every_definition_opens_with_its_command_and_can_be_planned(path):
    source = path.read_text()
    assert f"python -m oq2vl_jax.ablate run {path.stem} --out runs/" in ast.get_docstring(ast.parse(source))
    plan = make_plan(load_ablation(path.stem), path.stem)
    assert all(config.num_steps > 0 for arm in plan.arms.values() for config in arm.stages.values())


def test_published_stages_are_three_settings_of_what_is_trained():
    parts = {
        name: load_config(f"configs/{name}.py").trainable.parts for name in ("pretrain", "full_pretrain", "sft_llava")
    }
    assert parts == {
        "pretrain": ("projector", "decoder"),
        "full_pretrain": ("vision", "projector", "decoder"),
        "sft_llava": ("projector", "decoder"),
    }


def test_misspelt_keys_get_a_hint(tmp_path):
    values = dataclasses.asdict(load_config("configs/tiny.py"))
    values["optimizer"]["learning_rte"] = values["optimizer"].pop("learning_rate")
    with pytest.raises(UserError, match=r"unknown key 'learning_rte' \(did you mean 'learning_rate'\?"):
        from_dict(TrainConfig, values, where="config.json")
    file = tmp_path / "typo.py"
    file.write_text("from oq2vl_jax.config import OptimizerConfig\nconfig = OptimizerConfig(learning_rte=1)\n")
    with pytest.raises(
        UserError, match=r"OptimizerConfig has no field 'learning_rte' \(did you mean 'learning_rate'\?\)"
    ):
        load_config(str(file))
    with pytest.raises(UserError, match=r"no such config file \(did you mean 'configs/tiny.py'\?\)"):
        load_config("configs/tiney.py")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("seed", "seven", "seed: expected int, got 'seven'"), ("compute_dtype", "fp16", "compute_dtype: expected")],
)
def test_values_of_another_type_are_refused(key, value, message):
    values = dataclasses.asdict(load_config("configs/tiny.py")) | {key: value}
    with pytest.raises(UserError, match=message):
        from_dict(TrainConfig, values, where="config.json")


def test_a_number_of_visual_tokens_that_is_no_square_names_the_nearest():
    model = load_config("configs/tiny.py").model
    with pytest.raises(UserError, match=r"num_visual_tokens = 143 is no square number.*121 or 144"):
        dataclasses.replace(model, num_visual_tokens=143)


def test_flatten_names_every_leaf():
    assert flatten(VisionConfig(32, 8, 16, 32, 2, 2))["patch_size"] == 8
    assert flatten(load_config("configs/tiny.py"))["optimizer.learning_rate"] == 3e-3


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick_and_imports_neither_jax_nor_torch(command):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{command}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('{command}', run_name='__main__')\n"
        "except SystemExit as e:\n"
        "    assert e.code in (0, None), e.code\n"
        "assert not {'jax', 'torch', 'flax', 'grain', 'transformers'} & set(sys.modules)\n"
    )
    start = children_seconds()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
    assert children_seconds() - start < MAX_HELP_SECONDS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["oq2vl_jax.train", "configs/tiny.py", "--optimizer.learning-rte", "1"], "--optimizer.learning-rate"),
        (["oq2vl_jax.train", "configs/nothing.py"], "configs/nothing.py: no such config file"),
        (["oq2vl_jax.train", "--num-steps", "3"], "the first argument is the config file"),
        (["oq2vl_jax.data.pack", "--shards", "x.tar", "--out", "o", "--tokeniser", "t"], "--tokenizer"),
        (["oq2vl_jax.curate.filter", "no.toml", "--metadata", "x", "--out", "o"], "no.toml: no such file"),
        (["oq2vl_jax.curate.reshard", "--shards", "no.tar", "--uids", "u", "--out", "o"], "no file no.tar"),
        (
            ["oq2vl_jax.curate.score", "--shards", "no.tar", "--out", "o", "--model", "clip", "--checkpoint", "c"],
            "no file",
        ),
        (
            ["oq2vl_jax.curate.score", "--shards", "no.tar", "--out", "o", "--model", "klip", "--checkpoint", "c"],
            "clip",
        ),
        (["oq2vl_jax.data.inspect", "nowhere"], "no packed rows here"),
        (["oq2vl_jax.bench", "paking"], "packing"),
        (["oq2vl_jax.generate", "--checkpoint", "nowhere", "--prompt", "hi"], "nowhere: no whole checkpoint here"),
        (["oq2vl_jax.generate", "--checkpoint", "nowhere"], "give either --prompt"),
        (
            ["oq2vl_jax.generate", "--checkpoint", "nowhere", "--prompt", "hi", "--template", "llama"],
            "chatml",
        ),
        (
            ["oq2vl_jax.generate", "--checkpoint", "nowhere", "--prompt", "hi", "--top-p", "2"],
            "--top-p must be above 0",
        ),
        (["oq2vl_jax.eval", "--checkpoint", "c", "--tasks", "mmbnch", "--data", "d", "--out", "o"], "'mmbench'"),
        (["oq2vl_jax.eval", "--checkpoint", "c", "--tasks", "pope", "--data", "d", "--out", "o"], "--data d: no such"),
        (["oq2vl_jax.serve", "--checkpoint", "nowhere"], "nowhere: no whole checkpoint here"),
        (["oq2vl_jax.serve", "--checkpoint", "nowhere", "--allow-files", "no"], "--allow-files no: no such folder"),
        (
            ["oq2vl_jax.generate", "--checkpoint", "x", "--image", "no.png", "--prompt", "p"],
            "--image no.png: no such file",
        ),
    ],
)
def test_what_the_user_caused_is_exit_code_2_without_a_traceback(arguments, message):
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert message in output
    assert "Traceback" not in output


def test_dry_run_prints_configuration_parameters_and_bytes(tmp_path):
    command = [sys.executable, "-m", "oq2vl_jax.train", "configs/pretrain.py", "--dry-run", "--init-from", "None"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert '"learning_rate": 5e-05' in done.stdout
    assert "1,543,714,304 parameters, trained" in done.stdout
    assert "397,745,440 parameters, frozen" in done.stdout
    assert "GiB" in done.stdout
    assert not Path("runs/pretrain").exists()


def test_a_missing_file_that_nobody_named_keeps_its_traceback():
    """Nothing but a full disk, a path that cannot be and a missing permission is taken for the user's doing."""

    def missing():
        open("/no/such/file")  # noqa: SIM115

    with pytest.raises(FileNotFoundError):
        run_command(missing)


def test_what_may_change_in_a_resumed_run_is_said_at_the_fields():
    names = names_of_role(TrainConfig, "operational")
    assert {"run_dir", "mesh.data", "held_out.sources", "execution.tiles", "data.verify", "gradients"} <= names
    assert not [name for name in names if name.startswith(("model.", "optimizer.", "trainable."))]
    assert names_of_role(ModelConfig, "initial") == {"vision.patch_init_gain"}


def test_output_that_nobody_reads_to_its_end_is_no_traceback():
    command = f"{sys.executable} -m oq2vl_jax.train configs/tiny.py --help | head -c 20; echo; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 141)


@dataclass(frozen=True)
class Square:
    kind: Literal["square"] = "square"
    side: float = 1.0


@dataclass(frozen=True)
class Rectangle:
    kind: Literal["rectangle"] = "rectangle"
    side: float = 1.0
    height: int | None = None


@dataclass(frozen=True)
class Drawing:
    shape: Square | Rectangle = Square()
    parts: tuple[str, ...] | str = ()
    scale: float | Literal["auto"] = "auto"


@pytest.mark.parametrize(
    "drawing",
    [
        Drawing(),
        Drawing(Rectangle(side=2, height=3), parts=("a", "b"), scale=2),
        Drawing(Rectangle(), parts="all"),
        Drawing(Square(side=3)),
    ],
)
def test_unions_come_back_as_the_member_they_were(drawing):
    back = from_dict(Drawing, json.loads(to_json(drawing)), where="json")
    assert back == drawing
    assert type(back.shape) is type(drawing.shape)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": {"kind": "square", "height": 2}}, "here: shape: unknown key 'height' .in Square."),
        ({"shape": {"kind": "circle"}}, "here: shape: kind: expected one of square, got 'circle'"),
        ({"shape": 3}, "here: shape: expected Square or Rectangle, got '3'"),
        ({"parts": 3}, "here: parts: expected a list or str, got '3'"),
        ({"scale": "big"}, "here: scale: expected float or one of auto, got 'big'"),
        ({"scale": True}, "here: scale: expected float or one of auto, got 'True'"),
    ],
)
def test_what_fits_no_member_is_named(values, message):
    with pytest.raises(UserError, match=message):
        from_dict(Drawing, values, where="here")


@dataclass(frozen=True)
class Adam:
    rate: float = 1.0


@dataclass(frozen=True)
class Lion:
    rate: float = 1.0


@dataclass(frozen=True)
class Momentum(Adam):
    momentum: float = 0.9


@dataclass(frozen=True)
class Ambiguous:
    optimizer: Adam | Lion


@dataclass(frozen=True)
class Nested:
    optimizer: Momentum | Adam


def test_classes_that_their_fields_do_not_tell_apart_are_refused_or_chosen_by_their_very_fields():
    with pytest.raises(UserError, match="optimizer: Adam and Lion have the same fields; give each a field kind"):
        from_dict(Ambiguous, {"optimizer": {"rate": 2.0}}, where="here")
    for optimizer in (Adam(2.0), Momentum(2.0, 0.5)):
        back = from_dict(Nested, json.loads(to_json(Nested(optimizer))), where="here")
        assert back.optimizer == optimizer
        assert type(back.optimizer) is type(optimizer)


def test_a_subclass_of_a_configuration_is_refused_as_its_fields_would_be_lost(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import dataclasses, runpy\n"
        "from oq2vl_jax.config import OptimizerConfig\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Mine(OptimizerConfig):\n"
        "    momentum: float = 0.5\n"
        f"tiny = runpy.run_path({str(Path('configs/tiny.py').absolute())!r})['config']\n"
        "config = dataclasses.replace(tiny, optimizer=Mine(1e-3, 0.0))\n"
    )
    with pytest.raises(UserError, match="optimizer: expected OptimizerConfig, got Mine; a configuration of another"):
        load_config(str(file))


def test_values_are_replaced_by_their_dotted_names():
    changed = with_changes(
        load_config("tiny"), ["optimizer.kind=muon", "ema.decay=0.9", "data.sources=[]"], "--changes"
    )
    assert (changed.optimizer.kind, changed.ema.decay, changed.data.sources) == ("muon", 0.9, ())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("optimizer.kin=muon", r"--changes: optimizer: unknown key 'kin' \(did you mean 'kind'\?\)"),
        ("optimizer.kind=muo", "--changes: optimizer: kind: expected one of adamw, muon, got 'muo'"),
        ("seed.x=1", "unknown key 'seed.x'"),
        ("seed", "'seed' is no KEY=VALUE"),
    ],
)
def test_a_change_that_does_not_fit_is_one_sentence(change, sentence):
    with pytest.raises(UserError, match=sentence):
        with_changes(load_config("tiny"), [change], "--changes")
