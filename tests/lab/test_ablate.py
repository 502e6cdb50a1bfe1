"""An ablation of the smallest model: run and report; workers that die, cells that fail, folders of another plan."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from oq2vl_jax.ablate import ReportCommand, RunCommand, report, run
from oq2vl_jax.config_files import load_config, to_json
from oq2vl_jax.errors import UserError
from oq2vl_jax.lab import worker
from oq2vl_jax.lab.cells import judged_cells, run_folder, status_of
from oq2vl_jax.lab.registration import from_json
from oq2vl_jax.lab.report import category_rows, other_labels
from oq2vl_jax.lab.results import collect
from oq2vl_jax.lab.runs import read_records
from oq2vl_jax.lab.worker import Worker, work
from tests.lab.conftest import DEFINITION, NUM_STEPS, TWO_STAGES, train_here


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


@pytest.mark.slow
def test_workers_on_ray_end_with_the_same_bytes(finished, definition, tmp_path):
    command = command_of(definition, tmp_path / "out", "--executor", "ray", "--ray-address", "local")
    done = subprocess.run([*command, "--num-workers", "2"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    for name in ("report.md", "results.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes().replace(
            str(finished).encode(), str(tmp_path / "out").encode()
        )


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


def test_losses_over_other_tokens_and_categories_of_questions_are_said(finished):
    plan = load_plan(finished)
    results = collect(plan, str(finished))
    label, category = "first:total_labelled_tokens", "emoji:accuracy/concept/seen"
    done = [
        one._replace(numbers=one.numbers | {label: 114 if one.cell.arm == "fast" else 100, category: 0.5})
        for one in results.done
    ]
    results = results._replace(done=done)
    assert other_labels(results) == [
        "fast labels 14 % more tokens than base in first: the two losses are means over different tokens."
    ]
    assert category_rows(results) == [("emoji, concept: seen", "0.5000", "0.5000")]


def test_a_published_page_has_its_charts_its_plan_and_its_numbers(finished, definition, tmp_path):
    report(ReportCommand(definition, str(finished), publish=str(tmp_path)))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "rate-difference.svg", "rate-first.svg", "rate-plan.json", "rate-results.csv", "rate.md",
    ]  # fmt: skip
    assert "![difference](rate-difference.svg)" in (tmp_path / "rate.md").read_text()


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


def test_a_resolved_stage_is_an_ordinary_configuration(finished):
    for file in finished.glob("runs/*/seed-*/first.json"):
        assert to_json(load_config(str(file))) == file.read_text()
