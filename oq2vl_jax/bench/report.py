"""Runs every measurement of one device in one command: `python -m oq2vl_jax.bench report --out DIR`.

    a  the device, its measured peak rates            e  tuning, full pre-training, decoding
    b  exactness of attention and of the step         f  a profile of the step
    c  the step, then one change at a time            g  a loss curve in bfloat16 and float32
    d  PyTorch's two forms, in turns                  h  bench plan for GPUs that are not here

The most valuable parts run first, within --minutes. The same command resumes a report that was cut off and compiles
nothing twice. It uses one device even if there are more. DIR/report.md is the page, DIR/report.json holds its figures.
Parts a, b and c need only what training without data needs: jax, flax, optax, orbax, numpy and tyro.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from oq2vl_jax.bench.parts import plans, steps
from oq2vl_jax.bench.report_page import write_page
from oq2vl_jax.bench.report_runner import Item, Runner, run_item
from oq2vl_jax.bounds import Between, check_bounds
from oq2vl_jax.config_files import load_config
from oq2vl_jax.errors import UserError
from oq2vl_jax.paths import check_out, write_text

GROUPS = "abcdefgh"
GPU_CONFIG, CPU_CONFIG = "configs/pretrain.py", "configs/bench_mid.py"
GPU_MINUTES, CPU_MINUTES = 8.0, 3.7
GPU_SHARES = {"a": 0.06, "b": 0.16, "c": 0.38, "d": 0.15, "e": 0.13, "f": 0.05, "g": 0.06, "h": 0.01}
CPU_SHARES = {"a": 0.03, "b": 0.22, "c": 0.14, "d": 0, "e": 0.28, "f": 0.15, "g": 0.17, "h": 0.01}
"""Shares of the minutes: a guess on a GPU, measured on two CPU cores. There part d takes two minutes and has no
share; it runs after the others unless a to c end early."""
Minutes = Annotated[float, Between(0.0, 24.0 * 60, is_above=True)]
SOURCES = ("oq2vl_jax/**/*.py", "configs/*.py", "tests/peers/*.py", "convert/**/*.py")


@dataclass(frozen=True)
class Report:
    """Exactness, speed and memory of this device, beside the predicted values."""

    out: str
    """Folder of the report; an unfinished report is resumed."""
    minutes: Minutes | None = None
    """Time limit of one call; None: 8 on a GPU, 3.7 on a CPU."""
    only: str | None = None
    """Parts by their letters or items by their names, such as b,step_gate_up; what these need is run as well."""
    config: str | None = None
    """Configuration of the measured step; None: configs/pretrain.py on a GPU, configs/bench_mid.py on a CPU."""
    overwrite: bool = False
    """Start a new report; needed if --out holds one of another source, device, configuration or version of jax."""
    commit: str | None = None
    """Commit that the page names; None: ask git."""
    json: bool = False


OPTIONS = Report


def measure(options: Report) -> dict[str, Any]:
    """Returns the report's record: {"identity", "commit", "items": {name: {"status", "why", "figures", ..}}}."""
    check_bounds(options, as_flags=True)
    check_only(options.only)
    folder = Path(options.out)
    check_out(options.out)
    if options.config:
        load_config(options.config)  # says what is wrong with it before anything runs
    environment = one_device(folder)
    probe = probed(folder, environment)
    is_gpu = probe["platform"] in ("gpu", "cuda", "rocm")
    config = options.config or (GPU_CONFIG if is_gpu else CPU_CONFIG)
    record = begun(options, folder, config, probe)
    minutes = options.minutes or (GPU_MINUTES if is_gpu else CPU_MINUTES)
    setting = {"folder": str(folder), "config": config, "is_default": options.config is None, "is_gpu": is_gpu}
    items = chosen_items(options.only, report_items(setting, minutes))
    runner = Runner(folder, record, lambda record: write_record(folder, record))
    with interrupted_by_sigterm():
        runner.run(items, 60 * minutes, environment)
    return record | {"page": str(folder / "report.md")}


def check_only(only: str | None) -> None:
    names = {item.name for item in report_items({"is_gpu": True}, 1)}
    if only is not None and not words_of(only) <= names | set(GROUPS):
        raise UserError(
            f"--only {only}: expected some of {','.join(GROUPS)} or {', '.join(sorted(names))}, such as b,step_remat."
        )


def words_of(only: str) -> set[str]:
    return {word.strip() for word in only.split(",")}


def chosen_items(only: str | None, items: list[Item]) -> list[Item]:
    """Returns the items that --only names by letter or name, with the items that these need, in their order."""
    if only is None:
        return items
    chosen = {item.name for item in items if words_of(only) & {item.group, item.name}}
    chosen |= {item.needs for item in items if item.name in chosen and item.needs}
    if any(item.name in chosen and item.group in "cdef" for item in items):
        chosen.add("device")  # the rates of this device, for its rooflines
    return [item for item in items if item.name in chosen]


def report_items(setting: dict[str, Any], minutes: float) -> list[Item]:
    """Returns the items to run, the most valuable first."""
    shares, named = dict(GPU_SHARES if setting["is_gpu"] else CPU_SHARES), set()

    def item(name: str, group: str, limit: float, needs: str | None = None) -> Item:
        command = (sys.executable, "-m", "oq2vl_jax.bench.parts", name, json.dumps(setting))
        share = 0.0 if group in named else shares[group]
        named.add(group)
        return Item(name, group, command, min(limit, 60 * minutes), share, needs)

    return [
        item("device", "a", 90),
        item("exactness", "b", 150),
        item("exactness_step", "b", 180),
        item("step", "c", 240),
        *(item(f"step_{name}", "c", 150, needs="step") for name in steps.VARIANTS),
        item("peers", "d", 300, needs="step"),
        item("sft", "e", 150),
        item("full_pretrain", "e", 150),
        item("decoding", "e", 150),
        item("decoding_transformers", "e", 150),
        item("profile", "f", 150, needs="step"),
        item("learning", "g", 150),
        *(item(f"plan_{name}", "h", 900) for name in plans.DEVICES),
    ]


def one_device(folder: Path) -> dict[str, str]:
    """Returns the environment of every part: one visible device, and a compilation cache in the folder."""
    environment = dict(os.environ)
    environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    flags = environment.get("XLA_FLAGS", "").split()
    environment["XLA_FLAGS"] = " ".join(flag for flag in flags if "host_platform_device_count" not in flag)
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str((folder / "compilation_cache").absolute()))
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    return environment


def probed(folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Probes the device in another process, so that this one never holds it. Raises UserError if there is none."""
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    command = (sys.executable, "-m", "oq2vl_jax.bench.parts", "probe", json.dumps(
        {"folder": str(folder), "config": "", "is_default": True, "is_gpu": False}))  # fmt: skip
    status, why = run_item(Item("probe", "a", command, 120), folder, 120, environment)
    if status != "done":
        raise UserError(f"jax finds no device that it can use here ({why}).")
    return json.loads((folder / "parts" / "probe.json").read_text())


def begun(options: Report, folder: Path, config: str, probe: dict[str, Any]) -> dict[str, Any]:
    """Returns the record of the folder, or a new one. Raises UserError if the folder holds another report."""
    identity = {
        "source": source_digest(), "config": config, "device": probe["kind"], "jax": probe["versions"]["jax"],
    }  # fmt: skip
    commit = options.commit or git_commit()
    file = folder / "report.json"
    if file.exists() and not options.overwrite:
        try:
            record = json.loads(file.read_text())
            others = [name for name, value in identity.items() if record["identity"][name] != value]
            assert isinstance(record["items"], dict)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise UserError(f"{file} is not a report of this command; name another --out, or --overwrite.") from error
        if others:
            raise UserError(
                f"--out {folder} holds a report of another {' and '.join(others)} (commit {record['commit']}, "
                f"{record['identity']['device']}); name another --out, or --overwrite to begin anew."
            )
        for item in record["items"].values():
            if item["status"] == "failed":  # tried once more by this call
                item["status"] = "not reached"
        return record
    for old in (folder / "parts").glob("*.json") if options.overwrite else ():
        old.unlink()
    date = time.strftime("%Y-%m-%d")
    return {"identity": identity, "commit": commit, "date": date, "probe": probe, "items": {}}


def source_digest() -> str:
    """Returns 16 hex digits of a SHA-256 over the measured source files, independent of the checkout's path."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for file in sorted(path for pattern in SOURCES for path in root.glob(pattern)):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def git_commit() -> str:
    """Returns the commit of the checkout, with "and changes" if files are modified; "unknown" outside a checkout."""
    root = Path(__file__).parents[2]
    try:
        asked = [
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20)
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if asked[0].returncode:
        return "unknown"
    return asked[0].stdout.strip()[:12] + (" and changes" if asked[1].stdout.strip() else "")


def write_record(folder: Path, record: dict[str, Any]) -> None:
    write_text(str(folder / "report.json"), json.dumps(record, indent=1))
    write_page(folder, record)


class interrupted_by_sigterm:  # noqa: N801 (a context manager)
    """Makes SIGTERM end the running part as Ctrl-C does; finished parts are already written."""

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGTERM, self._interrupt)

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, self._before)

    @staticmethod
    def _interrupt(*_: Any) -> None:
        raise KeyboardInterrupt


def exit_code(record: dict[str, Any]) -> int:
    """Returns 1 if a part failed; parts that were skipped or not reached are not failures."""
    return int(any(item["status"] == "failed" for item in record["items"].values()))


def show(record: dict[str, Any]) -> None:
    """Prints a line for each part, and the path of the page."""
    for name, item in record["items"].items():
        print(f"{item['group']}  {name:22s} {item['status']:12s} {item['seconds']:6.1f} s  {item['why'] or ''}")
    print(f"\n{record['page']}")
