"""Runs the parts of a report one after the other, each in its own process, within a time limit.

    DIR/report.json        every part with its status, rewritten whole after each
    DIR/parts/NAME.json    figures of a part; DIR/parts/NAME.log: its output

A part that crashes, hangs or runs out of memory is ended and recorded as failed, and the next one runs. Every group of
parts has a share of the minutes; once it is used, the group's other items wait until all groups have had their turn.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

ENDED = ("done", "skipped", "failed")
"""Statuses of items that do not run again in this call. A later call retries failed items (report.begun)."""
WORTH_STARTING_SECONDS = 10.0
STACK_SECONDS = 1.0


class Item(NamedTuple):
    """group: the letter of its part. limit_seconds: an item that runs longer counts as hung. share: of the minutes, for
    the whole group; set on the first item of the group, 0 on the others. needs: an item that must be done before."""

    name: str
    group: str
    command: tuple[str, ...]
    limit_seconds: float
    share: float = 0.0
    needs: str | None = None


class Runner:
    """Runs items into a folder; `record` is the report so far."""

    def __init__(self, folder: Path, record: dict[str, Any], written: Callable[[dict[str, Any]], None]):
        """written: called with the record after every change."""
        self._folder, self._record, self._written = folder, record, written
        (folder / "parts").mkdir(parents=True, exist_ok=True)

    def run(self, items: Iterable[Item], seconds: float, environment: dict[str, str]) -> None:
        """Runs every item in turn, then those for which their group's share was too small, until `seconds` are over."""
        items = list(items)
        start, share = time.monotonic(), 0.0
        total = sum(item.share for item in items) or 1.0
        for item in items:
            share += item.share
            is_due = item.share > 0 or time.monotonic() < start + seconds * share / total
            self._turn(item, start + seconds if is_due else 0.0, environment)
        for item in items:
            self._turn(item, start + seconds, environment)

    def _turn(self, item: Item, end: float, environment: dict[str, str]) -> None:
        if self._record["items"].get(item.name, {}).get("status") in ENDED:
            return
        if item.needs and self._record["items"].get(item.needs, {}).get("status") != "done":
            self._note(item, "not reached", f"{item.needs} has not run", 0.0)
            return
        remaining = end - time.monotonic()
        if remaining < min(WORTH_STARTING_SECONDS, item.limit_seconds):
            self._note(item, "not reached", "the minutes were over", 0.0)
            return
        print(f"{item.group}  {item.name} ..", end=" ", file=sys.stderr, flush=True)
        begun = time.monotonic()
        status, why = run_item(item, self._folder, min(remaining, item.limit_seconds), environment)
        self._note(item, status, why, time.monotonic() - begun)
        print(f"{status}, {time.monotonic() - begun:.0f} s{f' ({why})' if why else ''}", file=sys.stderr, flush=True)

    def _note(self, item: Item, status: str, why: str | None, seconds: float) -> None:
        file = self._folder / "parts" / f"{item.name}.json"
        figures = json.loads(file.read_text()) if status == "done" else None
        self._record["items"][item.name] = {
            "group": item.group, "status": status, "why": why, "seconds": round(seconds, 1), "figures": figures,
        }  # fmt: skip
        self._written(self._record)


def run_item(item: Item, folder: Path, seconds: float, environment: dict[str, str]) -> tuple[str, str | None]:
    """Runs an item for at most `seconds`, then ends its process and all that it started; returns (status, why)."""
    out, log = folder / "parts" / f"{item.name}.json", folder / "parts" / f"{item.name}.log"
    out.unlink(missing_ok=True)
    with log.open("w") as said:
        process = subprocess.Popen(
            [*item.command, str(out)], stdin=subprocess.PIPE, stdout=said, stderr=said, start_new_session=True,
            env=environment,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            if seconds < item.limit_seconds:
                return "not reached", f"the minutes were over while it ran, after {seconds:.0f} s"
            dump_stack(process)
            return "failed", f"it hung: ended after {seconds:.0f} s"
        finally:
            end_group(process)
    if code == -signal.SIGKILL:
        return "failed", "it was killed by the system, most likely for want of memory"
    if code < 0:
        return "failed", f"it was ended by {signal.Signals(-code).name}"
    if code or not out.exists():
        return "failed", f"exit code {code}: {last_line(log)}"
    figures = json.loads(out.read_text())
    return ("skipped", figures["skipped"]) if "skipped" in figures else ("done", None)


def dump_stack(process: subprocess.Popen) -> None:
    """Makes a part that hangs write to its log where it stands (bench.parts registers SIGUSR1 with faulthandler)."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGUSR1)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STACK_SECONDS)


def end_group(process: subprocess.Popen) -> None:
    """Ends a process and everything it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        process.stdin.close()


def last_line(log: Path) -> str:
    """Returns the last line of a log, at most 300 characters."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it said nothing"
