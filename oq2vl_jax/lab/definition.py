"""The definition of an ablation: a question, arms, seeds, and what decides. configs/ablations/NAME.py binds `ablation`.

ablation = Ablation(
    question="Is Muon better than AdamW?",
    stages={"captions": "emoji"},
    arms={"adamw": {}, "muon": {"captions.optimizer.kind": "muon"}},
    baseline="adamw",
    tasks=(Task("emoji", data="emoji/data/test"),),
    smallest_effect=0.05,
)
"""

import dataclasses
import re
import runpy
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from oq2vl_jax.bounds import INT32_MAX, Count, CountOrZero, Positive, check_bounds
from oq2vl_jax.config_files import is_of_type, shipped_folder
from oq2vl_jax.errors import UserError, hint

Match = Literal["steps", "tokens", "flops"]
LOSSES = ("held_out_loss", "held_out_loss_ema", "loss")
SCORES = ("accuracy", "log_probability")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
AGAIN, ROUNDING = "again", "rounding"
TUPLES = ("seeds", "tune_seeds", "tasks", "prepare")
"""Fields that may be given as lists."""
TAKEN = ("cell", "child")
"""Files beside the folders of the stages."""


@dataclass(frozen=True)
class Task:
    """An evaluation of the last stage, by oq2vl_jax.eval."""

    name: str
    data: str
    """Folder with the benchmark's files."""
    method: Literal["generate", "options"] = "options"
    profile: Literal["official", "open_qwen2vl"] = "official"
    weights: Literal["model", "ema"] = "model"
    limit: Count | None = None


@dataclass(frozen=True, kw_only=True)
class Ablation:
    question: str
    """One sentence, which the report answers."""
    stages: dict[str, str]
    """Name: configuration, in their order; a stage starts from the weights of the one before."""
    arms: dict[str, dict[str, Any]]
    """Name: {"STAGE.KEY": value}; {} changes nothing. Keys are those of oq2vl_jax.train; "*.KEY" is of every stage."""
    baseline: str = "baseline"
    """The arm that others are compared with."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    match: Match = "steps"
    """What a stage of an arm may spend: as many steps, real tokens or model FLOPs as that of the baseline. num_steps
    follow from it; an arm that sets STAGE.num_steps keeps it."""
    tasks: tuple[Task, ...] = ()
    primary: str | None = None
    """Metric that decides: held_out_loss (of the last stage; loss is that of its last step), TASK:accuracy, or
    TASK:log_probability (of the right answer, far less noisy). None: that of the first task, without tasks
    held_out_loss."""
    smallest_effect: Positive = field()
    """Smallest difference of the primary metric that would matter, stated before the first run."""
    prepare: tuple[str, ...] = ()
    """Commands that make the data of the arms, such as "python -m oq2vl_jax.data.pack ..". They run once, in order."""
    tune: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """STAGE.KEY: factors tried for baseline and arms alike, on seeds of their own; the best by mean is judged."""
    tune_seeds: tuple[int, ...] = (101, 102)
    floor_seeds: CountOrZero = 1
    """Seeds on which the baseline runs again (difference 0 on a CPU) and with other rows_per_device (rounding)."""

    @property
    def metric(self) -> str:
        if self.primary is not None:
            return self.primary
        return f"{self.tasks[0].name}:log_probability" if self.tasks else "held_out_loss"

    @property
    def is_lower_better(self) -> bool:
        return self.metric in LOSSES


def load_ablation(path: str) -> Ablation:
    """Reads a definition, given by path or by its name in configs/ablations. Raises UserError."""
    folder = shipped_folder() / "ablations"
    names = sorted(file.stem for file in folder.glob("*.py"))
    file = folder / f"{path}.py" if path in names and not Path(path).is_file() else Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such definition{hint(path, names)}; there are {', '.join(names)}.")
    try:
        ablation = runpy.run_path(str(file)).get("ablation")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a definition is the researcher's own code
        raise UserError(f"{path}: {type(error).__name__}: {error}.") from error
    if isinstance(ablation, Ablation):
        lists = {name: tuple(getattr(ablation, name)) for name in TUPLES
                 if isinstance(getattr(ablation, name), list | range)}  # fmt: skip
        ablation = dataclasses.replace(ablation, **lists)
    if not isinstance(ablation, Ablation):
        raise UserError(f"{path}: must bind `ablation = Ablation(...)`, found {type(ablation).__name__}.")
    problems = problems_of(ablation)
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}.")
    return ablation


def problems_of(ablation: Ablation) -> list[str]:
    """Returns what is wrong with a definition, apart from the configurations of its stages."""
    problems = problems_of_types(ablation)
    if problems:
        return problems
    try:
        check_bounds(ablation)
    except UserError as error:
        return [str(error).rstrip(".")]
    problems = [] if ablation.stages else ["stages is empty"]
    for kind, names in (("stage", ablation.stages), ("arm", ablation.arms)):
        problems += [f"{kind} {name!r}: a name is letters, digits and _ . + -" for name in names if not is_name(name)]
    if ablation.baseline not in ablation.arms:
        near = hint(ablation.baseline, ablation.arms)
        problems.append(f"baseline = {ablation.baseline!r} is no arm{near}; there are {', '.join(ablation.arms)}")
    elif len(ablation.arms) < 2:
        problems.append("arms: give the baseline and another")
    for name, seeds in (("seeds", ablation.seeds), ("tune_seeds", ablation.tune_seeds)):
        problems += [f"{name}: {seed!r} is no seed" for seed in seeds if not is_seed(seed)]
        problems += [f"{name}: {seed} is given twice" for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]
    problems += [f"stage {name!r}: choose another name" for name in ablation.stages if name in TAKEN or "." in name]
    if not ablation.seeds:
        problems.append("seeds is empty")
    if ablation.tune and not ablation.tune_seeds:
        problems.append("tune_seeds is empty")
    problems += [f"tune: {key} has no factors" for key, factors in ablation.tune.items() if not factors]
    if ablation.tune and set(ablation.seeds) & set(ablation.tune_seeds):
        problems.append("tune_seeds: seeds that tune must not judge; give others than seeds")
    if len({task.name for task in ablation.tasks}) < len(ablation.tasks):
        problems.append("tasks: one is given twice")
    return problems + problems_of_tasks(ablation)


def problems_of_types(ablation: Ablation) -> list[str]:
    """Returns fields that hold something else than their type says."""
    numbers = (int, float)
    wanted = {
        "question": (is_text(ablation.question), "a sentence"),
        "stages": (is_table(ablation.stages, is_text), 'a dict of names and configurations, {"captions": "emoji"}'),
        "arms": (is_table(ablation.arms, lambda arm: isinstance(arm, dict) and all(map(is_text, arm))),
                 'a dict of names and changes, {"muon": {"captions.optimizer.kind": "muon"}}'),
        "baseline": (is_text(ablation.baseline), "the name of an arm"),
        "seeds": (isinstance(ablation.seeds, tuple), "a tuple, (1, 2, 3)"),
        "tune_seeds": (isinstance(ablation.tune_seeds, tuple), "a tuple, (101, 102)"),
        "prepare": (is_tuple(ablation.prepare, is_command), 'a tuple of commands, ("python -m ..",)'),
        "tasks": (is_tuple(ablation.tasks, lambda task: isinstance(task, Task)), 'a tuple, (Task("emoji", data="."),)'),
        "tune": (is_table(ablation.tune, lambda factors: is_tuple(factors, lambda x: isinstance(x, numbers))),
                 'a dict of keys and factors, {"captions.optimizer.learning_rate": (0.5, 1.0, 2.0)}'),
        "smallest_effect": (isinstance(ablation.smallest_effect, numbers), "a number"),
        "floor_seeds": (is_of_type(int, ablation.floor_seeds), "a number of seeds"),
    }  # fmt: skip
    return [f"{name}: expected {what}, got {getattr(ablation, name)!r}" for name, (is_right, what) in wanted.items()
            if not is_right]  # fmt: skip


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_table(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(is_text(key) and is_right(item) for key, item in value.items())


def is_tuple(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple) and all(map(is_right, value))


def is_command(value: Any) -> bool:
    try:
        return is_text(value) and bool(shlex.split(value))
    except ValueError:  # a quotation that does not end
        return False


def is_seed(value: Any) -> bool:
    return is_of_type(int, value) and 0 <= value <= INT32_MAX


def problems_of_tasks(ablation: Ablation) -> list[str]:
    from oq2vl_jax.eval.benchmarks import TASKS

    problems = []
    if ablation.match not in ("steps", "tokens", "flops"):
        problems.append(f"match = {ablation.match!r}; there are steps, tokens, flops")
    for task in ablation.tasks:
        if task.name not in TASKS:
            problems.append(f"tasks: no benchmark {task.name!r}{hint(task.name, TASKS)}; there are {', '.join(TASKS)}")
    name, _, score = ablation.metric.partition(":")
    known = [*LOSSES, *(f"{task.name}:{score}" for task in ablation.tasks for score in SCORES)]
    if ablation.metric not in known:
        problems.append(f"primary = {ablation.metric!r}{hint(ablation.metric, known)}; there are {', '.join(known)}")
    task = next((task for task in ablation.tasks if task.name == name), None)
    if task is not None and score == "log_probability" and task.method != "options":
        problems.append(f"primary = {ablation.metric!r} needs method options of the task, not {task.method}")
    return problems


def is_name(name: Any) -> bool:
    return isinstance(name, str) and NAME.fullmatch(name) is not None
