"""An ablation of the smallest model: plan, run, report; workers that die, cells that fail, wrong definitions."""

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import make_dataclass, replace
from pathlib import Path

import pytest

from oq2vl_jax.ablate import ReportCommand, RunCommand, report, run
from oq2vl_jax.config import OptimizerConfig
from oq2vl_jax.config_files import load_config, to_json
from oq2vl_jax.errors import UserError
from oq2vl_jax.lab import worker
from oq2vl_jax.lab.cells import all_cells, judged_cells, run_folder, stage_config, status_of, write_status
from oq2vl_jax.lab.definition import Ablation, Task, load_ablation
from oq2vl_jax.lab.plan import hash_of, make_plan
from oq2vl_jax.lab.registration import as_json, from_json, registered
from oq2vl_jax.lab.results import collect
from oq2vl_jax.lab.runs import read_records
from oq2vl_jax.lab.worker import Worker, work
from oq2vl_jax.train.run import run as train

TINY = str(Path("configs/tiny.py").absolute())
NUM_STEPS = 3

DEFINITION = f"""
from oq2vl_jax.lab.definition import Ablation

ablation = Ablation(
    question="Does a larger rate help?",
    stages={{"first": {TINY!r}}},
    arms={{"base": {{"*.num_steps": {NUM_STEPS}, "*.log_every": 1}},
          "fast": {{"*.num_steps": {NUM_STEPS}, "*.log_every": 1, "first.optimizer.learning_rate": 9e-3}}}},
    baseline="base",
    seeds=(1, 2),
    primary="loss",
    smallest_effect=0.1,
)
"""


def tiny(**changes):
    values = {
        "question": "Does it help?", "stages": {"shapes": TINY}, "arms": {"base": {}, "other": {}}, "baseline": "base",
        "primary": "loss", "smallest_effect": 0.1, "seeds": (1, 2),
    }  # fmt: skip
    return Ablation(**(values | changes))


TWO_STAGES = DEFINITION.replace(f'{{"first": {TINY!r}}}', f'{{"first": {TINY!r}, "second": {TINY!r}}}').replace(
    '"first.optimizer', '"second.optimizer'
)


@pytest.fixture(scope="module")
def definition(tmp_path_factory):
    file = tmp_path_factory.mktemp("definition") / "rate.py"
    file.write_text(DEFINITION)
    return str(file)


def train_here(what, out, cell, words, log):
    """Runs a stage in this process, which compiles once for all cells."""
    assert words[0] == "oq2vl_jax.train"
    with log.open("a") as file, contextlib.redirect_stdout(file):
        try:
            train(load_config(words[1]))
        except UserError as error:
            raise worker.CommandError(f"{what}: {error}") from error


@pytest.fixture(scope="module")
def finished(definition, tmp_path_factory):
    """The folder of an ablation that one worker ran without disturbance."""
    out = str(tmp_path_factory.mktemp("ablation") / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "run_child", train_here)
        assert run(RunCommand(definition, out)) == 0
    return Path(out)


def test_it_answers_with_a_verdict_and_the_same_baseline_twice_differs_by_nothing(finished):
    text = (finished / "report.md").read_text()
    assert "# Does a larger rate help?" in text
    assert "The baseline run again differs by exactly 0, over all its numbers." in text
    assert "**fast is" in text
    rows = list(csv.DictReader((finished / "results.csv").open()))
    assert {(row["arm"], row["seed"]) for row in rows} == {
        ("base", "1"), ("base", "2"), ("fast", "1"), ("fast", "2"), ("~again", "1"), ("~rounding", "1"),
    }  # fmt: skip
    digests = {(row["arm"], row["seed"]): row["value"] for row in rows if row["metric"] == "parameters_sha256"}
    assert digests["base", "1"] == digests["~again", "1"]
    page = (finished / "report.html").read_text()
    assert page.count("<svg") == 1 + 4


def test_a_stage_starts_from_the_one_before(tmp_path):
    (tmp_path / "two.py").write_text(TWO_STAGES)
    plan, out = make_plan(load_ablation(str(tmp_path / "two.py")), "two.py"), str(tmp_path)
    cell = next(cell for cell in judged_cells(plan, out) if cell.arm == "fast")
    first, second = (stage_config(cell, stage, out) for stage in ("first", "second"))
    assert first.init_from is None
    assert second.init_from == first.run_dir == str(run_folder(out, cell) / "first")
    assert (first.seed, second.optimizer.learning_rate, first.optimizer.learning_rate) == (1, 9e-3, 3e-3)


def load_plan(out):
    return from_json(json.loads((out / "plan.json").read_text()), "plan.json")


def test_a_finished_ablation_runs_nothing_again(finished, definition, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail("a cell ran again"))
    before = (finished / "report.md").read_bytes(), (finished / "results.csv").read_bytes()
    assert run(RunCommand(definition, str(finished))) == 0
    assert before == ((finished / "report.md").read_bytes(), (finished / "results.csv").read_bytes())


def test_finished_cells_are_taken_over_by_another_ablation(finished, definition, tmp_path, capsys, monkeypatch):
    text = DEFINITION.replace("Does a larger rate help?", "Does it help again?").replace('"fast"', '"quick"')
    (tmp_path / "again.py").write_text(text)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail("a cell ran again"))
    assert run(RunCommand(str(tmp_path / "again.py"), str(tmp_path / "out"), reuse=(str(finished),))) == 0
    assert "quick seed 2: taken from" in capsys.readouterr().out
    assert "**quick is" in (tmp_path / "out" / "report.md").read_text()


def command_of(definition, out, *more):
    return [sys.executable, "-m", "oq2vl_jax.ablate", "run", definition, "--out", str(out), *more]


@pytest.mark.slow
def test_a_nan_and_a_killed_child_fail_their_cells_alone(tmp_path):
    """Real processes: the rate of one arm is absurd, and the child of another is killed."""
    text = TWO_STAGES.replace("9e-3", "1000.0").replace("seeds=(1, 2)", "seeds=(1, 2), floor_seeds=0")
    (tmp_path / "nan.py").write_text(text.replace(f'"*.num_steps": {NUM_STEPS}', '"*.num_steps": 40'))
    out = tmp_path / "out"
    process = subprocess.Popen(command_of(str(tmp_path / "nan.py"), out), stdout=subprocess.PIPE, text=True)
    killed = None
    while process.poll() is None:
        children = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "lab.child.*base.*seed-2"],
                                  capture_output=True, text=True).stdout.split()  # fmt: skip
        if children and killed is None:
            time.sleep(3)
            killed = int(children[0])
            os.kill(killed, signal.SIGKILL)
        time.sleep(0.5)
    assert process.returncode == 1
    text = (out / "report.md").read_text()
    print(text)
    assert "ended by SIGKILL, perhaps for want of memory" in text
    assert "**fast: no verdict**" in text


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(finished, definition, tmp_path, num_workers):
    """20 kills over the three cases; every cell ends once."""
    rng, out = random.Random(num_workers), tmp_path / "out"
    kills = {1: 8, 2: 6, 4: 6}[num_workers]
    for _ in range(kills):
        process = subprocess.Popen(
            command_of(definition, out, "--num-workers", str(num_workers)), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
        )  # fmt: skip
        time.sleep(rng.uniform(4, 25))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(
        command_of(definition, out, "--num-workers", str(num_workers)), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("results.csv", "report.md"):
        assert (out / name).read_text().replace(str(out), "") == (finished / name).read_text().replace(
            str(finished), ""
        )
    for log in out.glob("runs/*/*/*.log"):
        assert log.read_text().count("done: step") == 1, f"{log}: ran twice"


def test_a_worker_that_never_comes_back_leaves_its_cell_to_others(finished, definition, tmp_path):
    """A claim of another host counts until its heartbeat is old; then the cell goes on."""
    out = tmp_path / "out"
    shutil.copytree(finished, out, symlinks=True)
    plan = load_plan(out)
    cell = next(judged_cells(plan, str(out)))
    (run_folder(str(out), cell) / "cell.json").unlink()
    claim = out / "claims" / f"{cell.name.replace('/', '-')}.json"
    claim.write_text(json.dumps({"host": "another", "pid": 1, "token": "x"}))
    os.utime(claim, (time.time() - 3600,) * 2)
    work(plan, Worker(str(out)))
    assert status_of(str(out), cell)["status"] == "done"
    assert not claim.exists()


def test_a_cell_that_fails_leaves_the_others_and_its_arm_gets_no_verdict(finished, definition, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(finished, out, symlinks=True)
    cells = [cell for cell in judged_cells(load_plan(out), str(out)) if cell.seed == 2]
    for cell in cells:
        shutil.rmtree(run_folder(str(out), cell))

    def fails_in_one_arm(what, folder, cell, words, log):
        if cell.arm == "fast":
            raise worker.CommandError(f"{what}: the loss is nan at step 2")
        log.with_suffix("").mkdir(exist_ok=True)
        shutil.copytree(run_folder(str(finished), cell) / "first", log.with_suffix(""), dirs_exist_ok=True)

    monkeypatch.setattr(worker, "run_child", fails_in_one_arm)
    assert run(RunCommand(definition, str(out))) == 1
    text = (out / "report.md").read_text()
    assert "**fast: no verdict**, 1 of its cells or the baseline's failed." in text
    assert "stage first: the loss is nan at step 2" in text
    assert [status_of(str(out), cell)["status"] for cell in cells] == ["done", "failed"]
    assert run(RunCommand(definition, str(out))) == 1  # it is not run again unless asked
    monkeypatch.setattr(worker, "run_child", train_here)
    assert run(RunCommand(definition, str(out), retry_failed=True)) == 0
    assert (out / "results.csv").read_bytes() == (finished / "results.csv").read_bytes()


def test_the_report_of_an_incomplete_set_says_so_and_gives_no_verdict(finished, definition, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out, symlinks=True)
    cell = [cell for cell in judged_cells(load_plan(out), str(out)) if cell.arm == "fast"][1]
    (run_folder(str(out), cell) / "cell.json").unlink()
    report(ReportCommand(definition, str(out)))
    text = (out / "report.md").read_text()
    assert "**fast: no verdict**, incomplete: 1 of 2 seeds are done." in text
    assert "## Missing: 1" in text


def test_a_published_page_has_its_charts_its_plan_and_its_numbers(finished, definition, tmp_path):
    report(ReportCommand(definition, str(finished), publish=str(tmp_path)))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "rate-difference.svg", "rate-first.svg", "rate-plan.json", "rate-results.csv", "rate.md",
    ]  # fmt: skip
    assert "![difference](rate-difference.svg)" in (tmp_path / "rate.md").read_text()


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


def test_a_task_without_data_stops_before_the_first_run(tmp_path):
    (tmp_path / "x.py").write_text(
        DEFINITION.replace('primary="loss"', f"tasks=(Task('emoji', data={str(tmp_path)!r}),)").replace(
            "import Ablation", "import Ablation, Task"
        )
    )
    with pytest.raises(UserError, match=r"emoji_test\.parquet"):
        run(RunCommand(str(tmp_path / "x.py"), str(tmp_path / "out")))
    assert not (tmp_path / "out" / "plan.json").exists()


def test_a_changed_definition_does_not_touch_an_old_folder(finished, definition, tmp_path):
    (tmp_path / "rate.py").write_text(DEFINITION.replace("smallest_effect=0.1", "smallest_effect=0.2"))
    before = (finished / "plan.json").read_bytes()
    with pytest.raises(UserError, match="planned with another smallest_effect"):
        run(RunCommand(str(tmp_path / "rate.py"), str(finished)))
    assert (finished / "plan.json").read_bytes() == before


def test_another_definition_prepares_nothing_in_an_old_folder(finished, tmp_path):
    text = DEFINITION.replace("smallest_effect=0.1", f"smallest_effect=0.1, prepare=('touch {tmp_path}/made',)")
    (tmp_path / "rate.py").write_text(text)
    with pytest.raises(UserError, match="planned with another prepare"):
        run(RunCommand(str(tmp_path / "rate.py"), str(finished)))
    assert not (tmp_path / "made").exists()


def test_a_later_stage_may_start_from_some_parts_and_the_moments_of_the_one_before():
    arms = {"base": {}, "x": {"again.init_optimizer": True}, "y": {"again.init_parts": ["vision", "decoder"]}}
    plan = make_plan(tiny(stages={"shapes": TINY, "again": TINY}, arms=arms), "x.py")
    assert plan.arms["x"].stages["again"].init_optimizer


def test_a_number_that_is_not_finite_fails_its_cell(finished, definition, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(finished, out, symlinks=True)
    cell = next(cell for cell in judged_cells(load_plan(out), str(out)) if cell.arm == "fast")
    file = run_folder(str(out), cell) / "first" / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 3, "held_out_loss": NaN}\n')
    (run_folder(str(out), cell) / "cell.json").unlink()
    monkeypatch.setattr(worker, "run_child", train_here)
    assert run(RunCommand(definition, str(out))) == 1
    assert "first:held_out_loss is nan" in (out / "report.md").read_text()


def test_records_end_with_the_last_whole_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_a_command_that_fails_to_prepare_is_a_sentence(tmp_path):
    text = DEFINITION.replace(
        "smallest_effect=0.1", "smallest_effect=0.1, prepare=('python -c \"raise SystemExit(3)\"',)"
    )
    (tmp_path / "x.py").write_text(text)
    with pytest.raises(UserError, match=r"prepare: .* failed"):
        run(RunCommand(str(tmp_path / "x.py"), str(tmp_path / "out")))


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


def test_a_resolved_stage_is_an_ordinary_configuration(finished):
    for file in finished.glob("runs/*/seed-*/first.json"):
        assert to_json(load_config(str(file))) == file.read_text()
