"""bench report: parts that fail, a report that is cut off, what it refuses, and what parts a to c may import."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from oq2vl_jax.bench import report, report_page
from oq2vl_jax.bench.parts import decoding, peers
from oq2vl_jax.bench.parts.setting import Setting, Skipped
from oq2vl_jax.bench.report import Report, exit_code
from oq2vl_jax.bench.report_runner import Item, Runner
from oq2vl_jax.errors import UserError
from tests.xla_flags import FAST_COMPILING

COMMAND = (sys.executable, "-m", "oq2vl_jax.bench", "report", "--config", "configs/tiny.py")
A_WHILE = "618.5"
"""Seconds, of a process that can be told from others."""
HANGS = f"import subprocess, time; subprocess.Popen(['sleep', '{A_WHILE}']); time.sleep({A_WHILE})"
FINE = "import json, sys; json.dump({'figure': 1}, open(sys.argv[1], 'w'))"
PROBE = {"kind": "cpu", "platform": "cpu", "versions": {"jax": "0"}, "driver": None, "host": "here"}


def item(name, program, limit=60.0, **more):
    return Item(name, "a", (sys.executable, "-c", program), limit, **more)


def run(folder, *items, seconds=60.0, record=None):
    record = record or {"items": {}, "probe": PROBE, "date": "today", "commit": "c", "identity": dict.fromkeys(
        ("source", "config"), "s")}  # fmt: skip
    Runner(folder, record, lambda record: report.write_record(folder, record)).run(items, seconds, dict(os.environ))
    return record


def test_a_part_that_fails_is_named_and_the_others_run(tmp_path):
    record = run(
        tmp_path,
        item("raises", "raise RuntimeError('no such kernel')"),
        item("hangs", HANGS, limit=2.0),
        item("out_of_memory", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        item("segfaults", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        item("says_nothing", "pass"),
        item("cannot", FINE.replace("'figure': 1", "'skipped': 'it needs the package torch'")),
        item("needs_one_that_failed", FINE, needs="raises"),
        item("fine", FINE),
    )  # fmt: skip
    statuses = {name: (found["status"], found["why"]) for name, found in record["items"].items()}
    assert statuses == {
        "raises": ("failed", "exit code 1: RuntimeError: no such kernel"),
        "hangs": ("failed", "it hung: ended after 2 s"),
        "out_of_memory": ("failed", "it was killed by the system, most likely for want of memory"),
        "segfaults": ("failed", "it was ended by SIGSEGV"),
        "says_nothing": ("failed", "exit code 0: it said nothing"),
        "cannot": ("skipped", "it needs the package torch"),
        "needs_one_that_failed": ("not reached", "raises has not run"),
        "fine": ("done", None),
    }
    assert record["items"]["fine"]["figures"] == {"figure": 1}
    assert exit_code(record) == 1
    assert json.loads((tmp_path / "report.json").read_text()) == record
    page = (tmp_path / "report.md").read_text()
    assert all(name in page for name in statuses)
    assert "no such kernel" in page
    assert A_WHILE not in subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True).stdout


def test_a_part_that_hangs_writes_where_it_stood(tmp_path):
    registered = "import faulthandler, signal; faulthandler.register(signal.SIGUSR1); "
    run(tmp_path, item("hangs", registered + HANGS, limit=2.0))
    assert "most recent call first" in (tmp_path / "parts" / "hangs.log").read_text()


def test_the_minutes_end_a_part_and_it_is_no_failure(tmp_path):
    record = run(tmp_path, item("long", "import time; time.sleep(600)"), item("later", FINE), seconds=11.0)
    assert record["items"]["long"]["status"] == record["items"]["later"]["status"] == "not reached"
    assert exit_code(record) == 0
    again = run(tmp_path, item("long", FINE), item("later", FINE), record=record)
    assert [found["status"] for found in again["items"].values()] == ["done", "done"]


def test_what_a_group_leaves_over_goes_to_those_behind_it(tmp_path):
    """The first group ends at once; the second has a small share and needs more than that."""
    slow = f"import time; time.sleep(3); {FINE}"
    record = run(tmp_path, item("quick", FINE, share=0.9), item("slow", slow, share=0.1), seconds=30.0)
    assert record["items"]["slow"]["status"] == "done"


def test_a_group_past_its_share_lets_the_others_run_first(tmp_path):
    stamped = "import json, sys, time; time.sleep(0.3); json.dump({'at': time.time()}, open(sys.argv[1], 'w'))"
    items = (item("base", stamped, share=0.001), item("change", stamped), item("next_group", stamped, share=0.9))
    found = run(tmp_path, *items, seconds=30.0)["items"]
    assert [one["status"] for one in found.values()] == ["done"] * 3
    assert found["next_group"]["figures"]["at"] < found["change"]["figures"]["at"]


def alive(folder):
    """Commands of a report's parts that still run."""
    shown = subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True).stdout
    return [line for line in shown.splitlines() if "oq2vl_jax.bench.parts" in line and str(folder) in line]


@pytest.mark.slow
def test_a_killed_report_goes_on_where_it_was(tmp_path):
    """SIGKILL in the middle, then the same command with a minute: what stands is not run again, the page is whole."""
    folder = tmp_path / "report"
    command = [*COMMAND, "--out", str(folder), "--minutes", "1"]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for(lambda: "device" in done_items(folder), 60)
    time.sleep(1)  # into the next part
    first.send_signal(signal.SIGKILL)
    first.wait()
    wait_for(lambda: not alive(folder), 10)
    before = json.loads((folder / "report.json").read_text())["items"]["device"]
    written = (folder / "parts" / "device.json").stat().st_mtime_ns
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - start < 85
    record = json.loads((folder / "report.json").read_text())
    assert record["items"]["device"] == before
    assert (folder / "parts" / "device.json").stat().st_mtime_ns == written
    assert {found["status"] for found in record["items"].values()} <= {"done", "skipped", "not reached"}
    page = (folder / "report.md").read_text()  # of how many parts a minute has room for depends on the machine
    titles = {"device": "a. The device", "exactness": "b. Exactness", "step": "c. The step"}
    done_titles = [title for name, title in titles.items() if record["items"][name]["status"] == "done"]
    assert all(f"## {title}" in page for title in (*done_titles, "Predicted and measured", "Every part"))
    assert all(name in page for name in record["items"])


def done_items(folder):
    file = folder / "report.json"
    return json.loads(file.read_text())["items"] if file.exists() else {}


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


BLOCKED = ("grain", "array_record", "webdataset", "fsspec", "tokenizers", "transformers", "torch", "PIL")
PARTS_A_TO_C = """
import json, sys
sys.modules.update(dict.fromkeys({blocked!r}))
from oq2vl_jax.bench.parts.__main__ import PARTS
from oq2vl_jax.bench.parts.setting import Setting
setting = Setting({folder!r}, "configs/tiny.py", False, False)
for name in ("probe", "device", "exactness", "exactness_step", "step"):
    json.dump(PARTS[name](setting), open({folder!r} + "/parts/" + name + ".json", "w"))
"""


@pytest.mark.slow
def test_parts_a_to_c_need_nothing_that_reads_data(tmp_path):
    """None in sys.modules makes an import fail."""
    (tmp_path / "parts").mkdir()
    environment = os.environ | {"XLA_FLAGS": FAST_COMPILING}
    program = PARTS_A_TO_C.format(blocked=BLOCKED, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "parts").glob("*.json")}
    of_float32 = next(row for row in found["exactness_step"]["step"] if row["type"] == "float32")
    assert of_float32["largest error of a gradient"] < 1e-4  # measured 5e-6
    errors = [row for row in found["exactness"]["attention"] if row["attention"] == "blocked"]
    assert all(row["times the reference's rounding"] < 4 for row in errors if row["type"] == "bfloat16")  # measured 1.4
    assert found["step"]["num_layers"] == 1
    assert found["step"]["scaled_tokens_per_second"] < found["step"]["tokens_per_second"]


@pytest.mark.parametrize("part", [peers.measure, decoding.measure_transformers])
def test_parts_that_compare_with_pytorch_say_that_it_is_missing(part, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(Skipped, match="needs the package torch"):
        part(Setting(str(tmp_path), "configs/tiny.py", False, False))


@pytest.fixture
def quick_report(monkeypatch, tmp_path):
    """measure(options) with one part that does nothing, on a device that need not be asked."""
    monkeypatch.setattr(report, "probed", lambda folder, environment: PROBE)
    monkeypatch.setattr(report, "report_items", lambda setting, minutes: [item("anything", FINE)])
    return lambda **more: report.measure(Report(str(tmp_path / "out"), minutes=1, **more))


def test_a_report_of_something_else_is_not_touched(quick_report, monkeypatch, tmp_path):
    record = quick_report()
    assert record["items"]["anything"]["status"] == "done"
    monkeypatch.setattr(report, "source_digest", lambda: "another")
    with pytest.raises(UserError, match=r"report of another source .*--overwrite"):
        quick_report()
    with pytest.raises(UserError, match="report of another source and config"):
        quick_report(config="configs/tiny.py")
    assert quick_report(overwrite=True)["identity"]["source"] == "another"
    (tmp_path / "out" / "report.json").write_text('{"items": []}')
    with pytest.raises(UserError, match="is not a report of this command"):
        quick_report()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": "b,x"}, "expected some of a,b,c"),
        ({"only": ""}, "expected some of a,b,c"),
        ({"minutes": 0.0}, "--minutes must be above 0"),
        ({"minutes": float("nan")}, "--minutes must be above 0"),
        ({"config": "configs/none.py"}, "no such config file"),
        ({"out": " "}, "--out is empty"),
    ],
)
def test_mistakes_are_one_sentence(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        report.measure(Report(**({"out": str(tmp_path)} | options)))


def test_no_device_is_one_sentence(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [*COMMAND, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"JAX_PLATFORMS": "cuda"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: jax finds no device that it can use here")
    assert len(done.stderr.splitlines()) == 1


def test_parts_that_others_need_are_run_with_them():
    items = report.report_items({"is_gpu": True}, 8)

    def chosen(only):
        return [found.name for found in report.chosen_items(only, items)]

    assert chosen("d") == ["device", "step", "peers"]
    assert chosen("b") == ["exactness", "exactness_step"]
    assert chosen("step_gate_up, f") == ["device", "step", "step_gate_up", "profile"]
    assert chosen(None) == [found.name for found in items]
    groups = [found.group for found in items]
    assert groups == sorted(groups)
    assert {needed for found in items if (needed := found.needs)} <= {found.name for found in items}
    assert sum(found.share for found in items) == pytest.approx(1, abs=0.05)


def test_the_largest_gaps_come_first():
    rows = [{"what": f"w{i}", "unit": "s", "predicted": 1.0, "measured": i, "ratio": float(i)} for i in range(9)]
    *_, gaps = report_page.prediction_section({"device": {"predictions": rows}})
    assert gaps == "The 5 largest gaps: w8 8; w7 7; w6 6; w5 5; w4 4."


def test_the_source_is_the_same_wherever_it_lies(tmp_path, monkeypatch):
    found = report.source_digest()
    for name in ("oq2vl_jax", "configs", "convert", "tests/peers"):
        shutil.copytree(name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(report, "__file__", str(tmp_path / "oq2vl_jax" / "bench" / "report.py"))
    assert report.source_digest() == found
    assert report.git_commit() == "unknown", "no checkout there"
    (tmp_path / "configs" / "tiny.py").write_text("")
    assert report.source_digest() != found


def test_what_failed_is_tried_once_more(quick_report, monkeypatch):
    monkeypatch.setattr(report, "report_items", lambda setting, minutes: [item("anything", "raise ValueError")])
    assert quick_report()["items"]["anything"]["status"] == "failed"
    monkeypatch.setattr(report, "report_items", lambda setting, minutes: [item("anything", FINE)])
    assert quick_report()["items"]["anything"]["status"] == "done"
