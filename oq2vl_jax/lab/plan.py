"""What an ablation will run: every arm's configurations, resolved and matched (registration.py keeps them)."""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

from oq2vl_jax.config import OPERATIONAL, ROLE, TrainConfig
from oq2vl_jax.config_files import names_of_role, set_values
from oq2vl_jax.errors import UserError
from oq2vl_jax.lab.definition import Ablation
from oq2vl_jax.lab.resolve import (
    EVERY_STAGE,
    SET_BY_THE_LAB,
    changed_stages,
    check_primary,
    check_tune,
    load_stages,
    value_at,
)

RESULT_DEPENDS_ON = ("data.sources",)
"""Operational fields that decide the result all the same, where arms differ in them."""


class StepWork(NamedTuple):
    """Mean contents of a step: real tokens and model FLOPs. is_counted: of rows read, else those of a typical row."""

    tokens: float
    flops: float
    is_counted: bool


@dataclasses.dataclass(frozen=True)
class Arm:
    """stages: resolved configurations, with the steps that matching gives; work: of their steps."""

    name: str
    changes: dict[str, Any]
    stages: dict[str, TrainConfig]
    work: dict[str, StepWork]

    @property
    def hash(self) -> str:
        return hash_of(self.stages)

    @property
    def flops(self) -> float:
        """Model FLOPs of one seed."""
        return sum(config.num_steps * self.work[stage].flops for stage, config in self.stages.items())

    @property
    def tokens(self) -> float:
        return sum(config.num_steps * self.work[stage].tokens for stage, config in self.stages.items())


@dataclasses.dataclass(frozen=True)
class Plan:
    """data: digests of the packed folders and of the tasks' files that are there."""

    ablation: Ablation
    arms: dict[str, Arm]
    data: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def baseline(self) -> Arm:
        return self.arms[self.ablation.baseline]


def hash_of(stages: dict[str, TrainConfig]) -> str:
    """Returns a digest of all that decides the result; operational fields do not."""
    ignored = names_of_role(TrainConfig, OPERATIONAL[ROLE]) - set(RESULT_DEPENDS_ON) | set(SET_BY_THE_LAB)
    kept = {
        stage: {key: value for key, value in set_values(config).items() if key not in ignored}
        for stage, config in stages.items()
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=list).encode()).hexdigest()[:8]


def make_plan(ablation: Ablation, where: str) -> Plan:
    """Resolves all arms. Raises UserError that lists every arm with a wrong key or a configuration that cannot run."""
    base = load_stages(ablation, where)
    resolved, problems = {}, []
    for name, changes in ablation.arms.items():
        try:
            resolved[name] = changed_stages(base, changes, f"arm {name}")
        except UserError as error:
            problems.append(str(error).rstrip("."))
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}.")
    check_tune(ablation, resolved, where)
    check_primary(ablation, resolved, where)
    work = {name: {stage: step_work(config) for stage, config in stages.items()} for name, stages in resolved.items()}
    arms = {}
    for name, stages in resolved.items():
        steps = {
            stage: matched_steps(ablation, name, stage, stages, resolved[ablation.baseline], work)
            for stage in ablation.stages
        }
        matched = {stage: dataclasses.replace(stages[stage], num_steps=steps[stage]) for stage in stages}
        arms[name] = Arm(name, ablation.arms[name], matched, work[name])
    for factors in candidates(ablation):
        for arm in arms.values():
            tuned(arm, factors)
    return Plan(ablation, arms, data_of(ablation, arms))


def data_of(ablation: Ablation, arms: dict[str, Arm]) -> dict[str, str]:
    from oq2vl_jax.data.packing.packed import fingerprint
    from oq2vl_jax.eval.benchmarks import find_benchmark
    from oq2vl_jax.eval.tables import find_files, sha256_of

    configs = [config for arm in arms.values() for config in arm.stages.values()]
    packed = [source for config in configs if config.data.kind == "packed" for source in config.data.sources]
    packed += [source for config in configs for source in config.held_out.sources]
    found = {
        source: fingerprint((source,)) for source in dict.fromkeys(packed) if Path(source, "manifest.json").is_file()
    }
    for task in ablation.tasks:
        try:
            found[task.name] = sha256_of(find_files(task.data, task.name, find_benchmark(task.name).files))
        except UserError:  # not there yet
            continue
    return found


def tuned(arm: Arm, factors: dict[str, float]) -> dict[str, TrainConfig]:
    """Returns the stages of an arm with values multiplied by factors."""
    changes = {key: value_at(arm.stages, key, arm.name) * factor for key, factor in factors.items()}
    return changed_stages(arm.stages, changes, f"arm {arm.name}")


def candidates(ablation: Ablation) -> list[dict[str, float]]:
    """Returns every choice of factors that tune tries."""
    return [dict(zip(ablation.tune, factors, strict=True)) for factors in itertools.product(*ablation.tune.values())]


def step_work(config: TrainConfig) -> StepWork:
    """Counts the first steps of packed data; without packed data, or before it is made, a typical row stands for it."""
    from oq2vl_jax.train.flops import model_flops, typical_row
    from oq2vl_jax.train.metrics import mean_step

    is_there = all(Path(source, "manifest.json").is_file() for source in config.data.sources)
    if config.data.kind == "packed" and is_there:
        tokens, flops = mean_step(config)
        return StepWork(tokens, flops, True)
    work, rows = typical_row(config), config.global_batch_size
    return StepWork(rows * work.tokens, rows * model_flops(config, work).total, False)


def matched_steps(
    ablation: Ablation,
    arm: str,
    stage: str,
    stages: dict[str, TrainConfig],
    baseline: dict[str, TrainConfig],
    work: dict[str, dict[str, StepWork]],
) -> int:
    steps = stages[stage].num_steps
    is_set = any(key in ablation.arms[arm] for key in (f"{stage}.num_steps", f"{EVERY_STAGE}.num_steps"))
    if ablation.match == "steps" or is_set:
        return steps
    spent, own = work[ablation.baseline][stage], work[arm][stage]
    ratio = spent.tokens / own.tokens if ablation.match == "tokens" else spent.flops / own.flops
    return max(1, round(baseline[stage].num_steps * ratio))


def rounding_stages(arm: Arm) -> dict[str, TrainConfig]:
    """Returns the stages with one row in a forward pass of a device (two, if that is what they have): the same
    arithmetic in another order."""
    return {
        stage: dataclasses.replace(config, rows_per_device=2 if config.rows_per_device == 1 else 1)
        for stage, config in arm.stages.items()
    }
