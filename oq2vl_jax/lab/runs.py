"""Reads what runs left behind: their configuration, their last numbers, and the scores of their evaluations."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oq2vl_jax import paths
from oq2vl_jax.errors import UserError

LOSSES = ("loss", "held_out_loss")
ROWS_DEPEND_ON = ("data.", "global_batch_size", "num_steps")
"""Fields of a configuration (or their beginnings) on which the rows of a step depend, besides the seed."""
NOT_OF_ROWS = ("data.num_threads", "data.num_workers", "data.verify", "data.exact_decoding", "data.as_seen",
               "data.attention_scope")  # fmt: skip
NEVER_COMPARED = ("run_dir", "seed")


class Run(NamedTuple):
    """config: flat, "optimizer.learning_rate" -> value. numbers: last value of each loss, and of every held-out one."""

    folder: str
    config: dict[str, Any]
    numbers: dict[str, float]
    num_steps: int

    @property
    def seed(self) -> int:
        return self.config["seed"]


def find_runs(option: str, pattern: str) -> list[Run]:
    """Returns the finished runs that a pattern names, by seed. Raises UserError."""
    folders = sorted(folder for folder in paths.expand_paths(option, pattern) if os.path.isdir(folder))
    if not folders:
        raise UserError(f"{option} {pattern!r}: no folder.")
    return sorted(map(read_run, folders), key=lambda run: run.seed)


def read_run(folder: str) -> Run:
    """Reads a finished run. Raises UserError for another folder and for a run that has not ended."""
    config = paths.read_json(os.path.join(folder, "config.json"))
    if not isinstance(config, dict) or not isinstance(config.get("seed"), int):
        raise UserError(f"{folder}: config.json is not of a run.")
    file = Path(folder) / "metrics.jsonl"
    if not file.exists():
        raise UserError(f"{folder}: no metrics.jsonl; it is no run directory.")
    records = read_records(file)
    if not any("parameters_sha256" in record for record in records):
        last = records[-1]["step"] if records else 0
        raise UserError(f"{folder}: the run has not ended (step {last}); only finished runs can be compared.")
    numbers = {name: value for record in records for name, value in record.items() if name.startswith(LOSSES)}
    return Run(folder, flat(config), numbers, records[-1]["step"])


def has_ended(folder: Path) -> bool:
    """Returns whether a run directory is of a finished run."""
    file = folder / "metrics.jsonl"
    return file.exists() and any("parameters_sha256" in record for record in read_records(file))


def last_values(folder: Path) -> dict[str, Any]:
    """Returns the last value of every name in metrics.jsonl."""
    return {name: value for record in read_records(folder / "metrics.jsonl") for name, value in record.items()}


def read_records(file: Path) -> list[dict[str, Any]]:
    """Returns the records of a JSON-lines file, without a last line that a kill cut off. Raises UserError."""
    text = file.read_text()
    try:
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except ValueError as error:
        raise UserError(f"{file}: a line is no JSON.") from error


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def changed_fields(a: Run, b: Run) -> dict[str, tuple[Any, Any]]:
    """Returns the fields in which two configurations differ, but for seed and run_dir."""
    names = dict.fromkeys([*a.config, *b.config])
    pairs = {name: (a.config.get(name), b.config.get(name)) for name in names if name not in NEVER_COMPARED}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def changed_environment(a: Run, b: Run) -> dict[str, tuple[Any, Any]]:
    """Returns in what the code, the versions and the devices of two runs differ, as far as they were recorded."""
    entries = [last_environment(run.folder) for run in (a, b)]
    names = dict.fromkeys([*entries[0], *entries[1]]) if all(entries) else {}
    pairs = {name: (entries[0].get(name), entries[1].get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def last_environment(folder: str) -> dict[str, Any]:
    """Returns what was recorded when the run last began or went on, flat; {} if nothing was."""
    try:
        entry = paths.read_json(os.path.join(folder, "environment.json"))[-1]
        return flat({name: value for name, value in entry.items() if name != "from_step"})
    except (UserError, LookupError, TypeError, AttributeError):  # of an earlier version, or damaged
        return {}


def have_the_same_rows(a: Run, b: Run) -> bool:
    """Returns whether runs of one seed read the same rows in the same order."""
    return not any(name.startswith(ROWS_DEPEND_ON) and name not in NOT_OF_ROWS for name in changed_fields(a, b))


class Scores(NamedTuple):
    """scores: 0..1, [evaluations, questions]. clusters: what questions share, their pictures."""

    scores: np.ndarray
    questions: list[str]
    clusters: list[str]


def read_scores(option: str, pattern: str) -> dict[str, Scores]:
    """Returns the scores by task of some evaluations (--out folders of oq2vl_jax.eval). Raises UserError."""
    folders = sorted(folder for folder in paths.expand_paths(option, pattern) if os.path.isdir(folder))
    tables = [read_predictions(folder) for folder in folders]
    tasks = set.intersection(*(set(table) for table in tables)) if tables else set()
    if not tasks:
        raise UserError(
            f"{option} {pattern!r}: no task that all of these folders have; expected TASK/predictions.jsonl."
        )
    return {task: joined(task, [table[task] for table in tables]) for task in sorted(tasks)}


def read_predictions(folder: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns task -> index of a question -> its record."""
    return {
        file.parent.name: {record["index"]: record for record in read_records(file)}
        for file in sorted(Path(folder).glob("*/predictions.jsonl"))
    }


def joined(task: str, tables: list[dict[str, dict[str, Any]]]) -> Scores:
    questions = list(tables[0])
    if any(set(table) != set(questions) for table in tables):
        raise UserError(
            f"{task}: the evaluations asked other questions; evaluate them with the same files and --limit."
        )
    scores = np.array([[table[index]["score"] for index in questions] for table in tables], float)
    return Scores(scores, questions, [tables[0][index].get("pictures", index) for index in questions])


def numbers_of(runs: Iterable[Run], name: str) -> list[float] | None:
    """Returns the number of each run, None if one has none."""
    values = [run.numbers.get(name) for run in runs]
    return None if any(value is None for value in values) else values  # pyright: ignore[reportReturnType]
