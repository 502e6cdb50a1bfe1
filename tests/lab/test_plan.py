"""The plan of an ablation: what its definition resolves to, what is refused, hashes, budgets, tuning."""

import json
from dataclasses import make_dataclass, replace

import pytest

from oq2vl_jax.config import OptimizerConfig
from oq2vl_jax.config_files import load_config, to_json
from oq2vl_jax.errors import UserError
from oq2vl_jax.lab.cells import all_cells, judged_cells, run_folder, stage_config, write_status
from oq2vl_jax.lab.definition import Task, load_ablation
from oq2vl_jax.lab.plan import hash_of, make_plan
from oq2vl_jax.lab.registration import as_json, from_json, registered
from oq2vl_jax.lab.results import collect
from oq2vl_jax.lab.trust import tuning_text
from tests.lab.conftest import TINY, TWO_STAGES, tiny


def test_a_stage_starts_from_the_one_before(tmp_path):
    (tmp_path / "two.py").write_text(TWO_STAGES)
    plan, out = make_plan(load_ablation(str(tmp_path / "two.py")), "two.py"), str(tmp_path)
    cell = next(cell for cell in judged_cells(plan, out) if cell.arm == "fast")
    first, second = (stage_config(cell, stage, out) for stage in ("first", "second"))
    assert first.init_from is None
    assert second.init_from == first.run_dir == str(run_folder(out, cell) / "first")
    assert (first.seed, second.optimizer.learning_rate, first.optimizer.learning_rate) == (1, 9e-3, 3e-3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arms": {"base": {}, "x": {"shapes.optimizer.learning_rat": 1}}}, "arm x.*'learning_rat' .did you mean"),
        ({"arms": {"base": {}, "x": {"shape.num_steps": 1}}}, "names no stage .did you mean 'shapes'"),
        ({"arms": {"base": {}, "x": {"shapes.seed": 1}}}, "'shapes.seed' is set by the laboratory"),
        ({"arms": {"base": {}, "x": {"shapes.num_steps": "many"}}}, "expected int, got 'many'"),
        ({"arms": {"base": {}, "x": {"shapes.num_steps": 0}}}, "num_steps must be"),
        ({"primary": "held_out_loss"}, "has no held_out.sources"),
        ({"arms": {"base": {}, "x": {"shapes.loss.z_loss": 0.1}}}, "primary = loss means something else in x"),
        ({"tune": {"shapes.num_steps": (0.51,)}}, "expected int"),
        (
            {
                "stages": {"shapes": TINY, "again": TINY},
                "arms": {"base": {}, "x": {"shapes.model.vision.num_layers": 2}},
            },
            "shapes and again: have other models .model.vision.num_layers",
        ),
        ({"stages": {"shapes": "tinny"}}, "stage shapes: tinny: no such config file .did you mean 'tiny'"),
    ],
)
def test_a_wrong_arm_or_stage_is_a_sentence(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        make_plan(tiny(**changes), "x.py")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seeds=(1, 2, 1)", "seeds: 1 is given twice"),
        ("seeds=()", "seeds is empty"),
        ("seeds=(1.5,)", "seeds: 1.5 is no seed"),
        ("baseline='bse'", "is no arm .did you mean 'base'"),
        ("arms={'base': {}}", "give the baseline and another"),
        ("arms={'base': {}, '../x': {}}", "a name is letters"),
        ("tasks=(Task('emoij', data='x'),)", "no benchmark 'emoij' .did you mean 'emoji'"),
        ("primary='emoji:accuracy'", "primary = 'emoji:accuracy'"),
        ("tasks=(Task('emoji', data='x', method='generate'),), primary=None", "needs method options"),
        ("match='hours'", "there are steps, tokens, flops"),
        ("smallest_effect=0.0", "smallest_effect must be"),
        ("tune={'shapes.optimizer.learning_rate': (1.0,)}, tune_seeds=(2,)", "must not judge"),
        ("seeds=5", r"seeds: expected a tuple, \(1, 2, 3\), got 5"),
        ("seeds=(2**40,)", "is no seed"),
        ("tasks=('emoji',)", "tasks: expected a tuple"),
        ("stages=['tiny']", "stages: expected a dict"),
        ("arms={'base': {}, 'x': None}", "arms: expected a dict"),
        ("prepare='python -m x'", "prepare: expected a tuple of commands"),
        ("prepare=('echo \"x',)", "prepare: expected a tuple of commands"),
        ("smallest_effect='0.1'", "smallest_effect: expected a number"),
        ("question=None", "question: expected a sentence"),
        ("tune={'shapes.num_steps': 2.0}", "tune: expected a dict"),
        ("tune={'shapes.num_steps': ()}", "tune: shapes.num_steps has no factors"),
        ("tune={'shapes.optimizer.learning_rate': (1.0,)}, tune_seeds=()", "tune_seeds is empty"),
        ("stages={'cell': 'tiny'}", "stage 'cell': choose another name"),
        ("stages={'v1.5': 'tiny'}", "stage 'v1.5': choose another name"),
        ("sedes=(1,)", "unexpected keyword argument 'sedes'"),
        ("question=1/0", "ZeroDivisionError"),
    ],
)
def test_a_wrong_definition_is_a_sentence(tmp_path, text, sentence):
    values = "question='?', stages={'shapes': 'tiny'}, arms={'base': {}, 'x': {}}, baseline='base', primary='loss', " \
             "smallest_effect=0.1"  # fmt: skip
    (tmp_path / "x.py").write_text(
        f"from oq2vl_jax.lab.definition import Ablation, Task\nablation = Ablation(**(dict({values}) | dict({text})))\n"
    )
    with pytest.raises(UserError, match=sentence):
        load_ablation(str(tmp_path / "x.py"))


def test_a_later_stage_may_start_from_some_parts_and_the_moments_of_the_one_before():
    arms = {"base": {}, "x": {"again.init_optimizer": True}, "y": {"again.init_parts": ["vision", "decoder"]}}
    plan = make_plan(tiny(stages={"shapes": TINY, "again": TINY}, arms=arms), "x.py")
    assert plan.arms["x"].stages["again"].init_optimizer


def test_the_hash_ignores_what_cannot_change_the_result(tmp_path):
    config = load_config(TINY)
    other = replace(config, run_dir="elsewhere", log_every=1, seed=3, rows_per_device=2)
    assert hash_of({"a": config}) == hash_of({"a": other})
    assert hash_of({"a": config}) != hash_of({"a": replace(config, num_steps=7)})
    assert hash_of({"a": config}) != hash_of({"a": replace(config, data=replace(config.data, sources=("x",)))})


def test_a_folder_of_a_version_with_other_hashes_is_refused():
    saved = as_json(make_plan(tiny(), "x.py"))
    next(iter(saved["arms"].values()))["hash"] = "older"
    with pytest.raises(UserError, match="was written by an earlier version, which named the folders"):
        from_json(saved, "plan.json")


def test_the_hash_survives_a_field_that_a_later_version_adds():
    later = make_dataclass("Later", [("damping", float, 0.5)], bases=(OptimizerConfig,), frozen=True)
    config = load_config(TINY)
    optimizer = later(**vars(config.optimizer))
    same, other = (replace(config, optimizer=replace(optimizer, damping=value)) for value in (0.5, 0.6))
    assert hash_of({"a": config}) == hash_of({"a": same})
    assert hash_of({"a": config}) != hash_of({"a": other})


def test_a_plan_survives_its_file():
    plan = make_plan(
        tiny(tune={"shapes.optimizer.learning_rate": (0.5, 2.0)}, tasks=(Task("emoji", data="x"),)), "x.py"
    )
    assert as_json(from_json(as_json(plan), "plan.json")) == as_json(plan)


def test_arms_may_spend_the_same_flops_or_tokens():
    arms = {"base": {}, "long": {"shapes.data.num_tokens": 256}, "set": {"shapes.num_steps": 5}}
    steps = {
        name: arm.stages["shapes"].num_steps
        for name, arm in make_plan(tiny(arms=arms, match="tokens"), "x").arms.items()
    }
    assert steps == {"base": 60, "long": 30, "set": 5}
    plan = make_plan(tiny(arms=arms, match="flops"), "x")
    spent = {name: arm.flops for name, arm in plan.arms.items()}
    assert abs(spent["long"] / spent["base"] - 1) < 0.03  # a step of 31
    assert plan.arms["set"].stages["shapes"].num_steps == 5


def test_tuning_chooses_by_the_mean_on_seeds_of_its_own(tmp_path):
    """Cells written by hand: the arm's best factor is 2, the baseline's 0.5; a failed candidate is out."""
    ablation = tiny(tune={"shapes.optimizer.learning_rate": (0.5, 1.0, 2.0)}, tune_seeds=(8, 9), floor_seeds=0)
    plan, out = make_plan(ablation, "x.py"), str(tmp_path)
    plan = registered(plan, out)
    assert {cell.seed for cell in all_cells(plan, out)} == {8, 9}
    losses = {("base", 0.5): 0.1, ("base", 1.0): 0.2, ("base", 2.0): 0.3, ("other", 0.5): 0.3, ("other", 1.0): 0.0,
              ("other", 2.0): 0.1}  # fmt: skip
    for cell in all_cells(plan, out):
        factor = round(cell.stages["shapes"].optimizer.learning_rate / 3e-3, 3)
        folder = run_folder(out, cell) / "shapes"
        folder.mkdir(parents=True)
        record = {"step": 60, "loss": losses[cell.arm, factor] + 0.01 * cell.seed, "parameters_sha256": "0"}
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        failed = (cell.arm, factor, cell.seed) == ("other", 1.0, 9)
        write_status(out, cell, "failed" if failed else "done", **({"why": "nan"} if failed else {}))
    judged = list(judged_cells(plan, out))
    rates = {cell.arm: cell.stages["shapes"].optimizer.learning_rate for cell in judged}
    assert rates == {"base": pytest.approx(1.5e-3), "other": pytest.approx(6e-3)}
    assert {cell.seed for cell in judged} == {1, 2}
    assert len(collect(plan, out).missing) == 4
    for cell in judged:
        folder = run_folder(out, cell) / "shapes"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 60, "loss": 0.1, "parameters_sha256": "0"}) + "\n")
        (folder / "config.json").write_text(to_json(cell.stages["shapes"]))
        write_status(out, cell, "done")
    assert tuning_text(collect(plan, out)) == [
        "Tuned alike for all arms, on seeds 8, 9 that do not judge: shapes.optimizer.learning_rate times 0.5, 1, 2.",
        "Chosen for base: shapes.optimizer.learning_rate = 0.0015.",
        "Chosen for other: shapes.optimizer.learning_rate = 0.006, the largest that was tried: a larger one may be "
        "better still.",
    ]
