"""What an ablation will run: every arm's configurations, resolved and matched. DIR/plan.json keeps it, written before
the first run and never changed: the pre-registration."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from oq2vl_jax import paths
from oq2vl_jax.config import OPERATIONAL, PARTS, ROLE, TrainConfig
from oq2vl_jax.config_files import flatten, from_dict, load_config, names_of_role, with_values
from oq2vl_jax.errors import UserError, hint
from oq2vl_jax.lab.definition import Ablation, Task

PLAN = "plan.json"
SET_BY_THE_LAB = ("run_dir", "seed", "init_from")
RESULT_DEPENDS_ON = ("data.sources",)
"""Operational fields that decide the result all the same, where arms differ in them."""
EVERY_STAGE = "*"


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
        stage: {key: value for key, value in flatten(config).items() if key not in ignored}
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


def check_primary(ablation: Ablation, resolved: dict[str, dict[str, TrainConfig]], where: str) -> None:
    """Raises UserError if the last stage of an arm will not have the loss that decides, or another loss than others."""
    last = list(ablation.stages)[-1]
    configs = {name: stages[last] for name, stages in resolved.items()}
    without = [name for name, config in configs.items() if not config.held_out.sources]
    if ablation.metric.startswith("held_out_loss") and without:
        raise UserError(
            f"{where}: primary = {ablation.metric}, but {last} of {', '.join(without)} has no held_out.sources; set "
            "them, or another primary."
        )
    if ablation.metric == "held_out_loss_ema" and any(config.ema.decay is None for config in configs.values()):
        raise UserError(f"{where}: primary = {ablation.metric}, but ema.decay is not set in every arm.")
    if ":" in ablation.metric:
        return
    for field in ("loss", "held_out") if ablation.metric == "loss" else ("held_out",):
        base = getattr(configs[ablation.baseline], field)
        others = [name for name, config in configs.items() if getattr(config, field) != base]
        if others:
            raise UserError(
                f"{where}: primary = {ablation.metric} means something else in {', '.join(others)}, whose {last}."
                f"{field} is another; choose a metric that all arms share."
            )


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


def load_stages(ablation: Ablation, where: str) -> dict[str, TrainConfig]:
    """Loads the configurations of the stages; one without a model takes that of the stage before."""
    stages: dict[str, TrainConfig] = {}
    for name, path in ablation.stages.items():
        before = list(stages.values())[-1].model if stages else None
        model_of: Callable[..., Any] | None = (lambda config, model=before: model) if before is not None else None
        try:
            stages[name] = load_config(path, model_of)
        except UserError as error:
            raise UserError(f"{where}: stage {name}: {error}") from error
    return stages


def changed_stages(base: dict[str, TrainConfig], changes: dict[str, Any], where: str) -> dict[str, TrainConfig]:
    """Applies {"STAGE.KEY": value}. Raises UserError for an unknown stage or key, with a hint."""
    by_stage: dict[str, dict[str, Any]] = {stage: {} for stage in base}
    for key, value in changes.items():
        stage, _, name = key.partition(".")
        if stage != EVERY_STAGE and stage not in base:
            raise UserError(f"{where}: {key!r} names no stage{hint(stage, base)}; there are {', '.join(base)} and *.")
        if name in SET_BY_THE_LAB and not (name == "init_from" and stage == next(iter(base))):
            raise UserError(f"{where}: {key!r} is set by the laboratory.")
        for one in base if stage == EVERY_STAGE else (stage,):
            by_stage[one][name] = value
    stages = {stage: with_values(config, by_stage[stage], f"{where}, {stage}") for stage, config in base.items()}
    names = list(stages)
    for stage, config in stages.items():
        started = config if stage == names[0] else dataclasses.replace(config, init_from="the stage before")
        check_can_run(started, f"{where}, {stage}")
    for before, stage in itertools.pairwise(names):
        check_same_model(stages[before], stages[stage], f"{where}: {before} and {stage}")
    return stages


def check_same_model(before: TrainConfig, after: TrainConfig, where: str) -> None:
    """Raises UserError if a stage cannot start from the weights of the one before."""
    if set(after.init_parts) != set(PARTS):
        return  # some parts are drawn anew, and may be others
    free = {"num_visual_tokens"}
    a, b = ({k: v for k, v in flatten(config.model).items() if k not in free} for config in (before, after))
    differing = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    if differing:
        raise UserError(f"{where}: have other models (model.{', model.'.join(differing)}); change both, as *.model...")


def check_can_run(config: TrainConfig, where: str) -> None:
    from oq2vl_jax.train.checks import check_config

    try:
        check_config(config, num_devices=1)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def check_tune(ablation: Ablation, resolved: dict[str, dict[str, TrainConfig]], where: str) -> None:
    for key in ablation.tune:
        for arm, stages in resolved.items():
            value = value_at(stages, key, f"{where}: tune")
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise UserError(f"{where}: tune: {key} is {value!r} in arm {arm}, expected a number to multiply.")


def value_at(stages: dict[str, TrainConfig], key: str, where: str) -> Any:
    stage, _, name = key.partition(".")
    known = {f"{one}.{field}": value for one, config in stages.items() for field, value in flatten(config).items()}
    if key not in known:
        raise UserError(f"{where}: no {key!r}{hint(key, known)}.")
    return flatten(stages[stage])[name]


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


def definition_json(ablation: Ablation) -> dict[str, Any]:
    definition = {field.name: getattr(ablation, field.name) for field in dataclasses.fields(ablation)}
    definition["primary"] = ablation.metric
    definition["tasks"] = [dataclasses.asdict(task) for task in ablation.tasks]
    return json.loads(json.dumps(definition))


def as_json(plan: Plan) -> dict[str, Any]:
    definition = definition_json(plan.ablation)
    arms = {
        name: {"hash": arm.hash, "changes": arm.changes,
               "stages": {stage: dataclasses.asdict(config) for stage, config in arm.stages.items()},
               "work": {stage: work._asdict() for stage, work in arm.work.items()}}
        for name, arm in plan.arms.items()
    }  # fmt: skip
    return json.loads(json.dumps({"definition": definition, "arms": arms, "data": plan.data}))


def from_json(saved: dict[str, Any], where: str) -> Plan:
    """Inverts as_json; fields that a later version added take their defaults. Raises UserError."""
    try:
        definition = dict(saved["definition"])
        tasks = tuple(Task(**task) for task in definition.pop("tasks"))
        tune = {key: tuple(factors) for key, factors in definition.pop("tune").items()}
        lists: dict[str, Any] = {key: tuple(definition.pop(key)) for key in ("seeds", "prepare", "tune_seeds")}
        ablation = Ablation(**definition, tasks=tasks, tune=tune, **lists)
        arms = {
            name: Arm(
                name, arm["changes"],
                {stage: from_dict(TrainConfig, config, where) for stage, config in arm["stages"].items()},
                {stage: StepWork(**work) for stage, work in arm["work"].items()},
            )
            for name, arm in saved["arms"].items()
        }  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: is no plan of oq2vl_jax.ablate, or damaged ({error!r}).") from error
    return Plan(ablation, arms, saved.get("data", {}))


def read_plan(out: str) -> Plan | None:
    """Returns the plan that an ablation in a folder was started with; None if there is none."""
    file = paths.join(out, PLAN)
    return from_json(paths.read_json(file), file) if paths.exists(file) else None


def registered(plan: Plan, out: str) -> Plan:
    """Returns the plan of the folder, which becomes this one if it has none. Raises UserError if they differ."""
    saved = read_plan(out)
    if saved is None:
        partial = Path(out, f"{PLAN}.{os.getpid()}.partial")
        partial.write_text(json.dumps(as_json(plan), indent=1) + "\n")
        try:
            with contextlib.suppress(FileExistsError):  # another worker was faster, and may have another definition
                os.link(partial, Path(out, PLAN))
        finally:
            partial.unlink()
        saved = read_plan(out)
        assert saved is not None
    refuse(out, differences(as_json(saved), as_json(plan)))
    return saved


def check_definition(ablation: Ablation, out: str) -> None:
    """Raises UserError if a folder was planned with another definition."""
    saved = read_plan(out)
    if saved is not None:
        refuse(out, differences(definition_json(saved.ablation), definition_json(ablation)))


def refuse(out: str, differing: list[str]) -> None:
    if differing:
        raise UserError(
            f"--out {out} was planned with another {', '.join(differing[:4])}{' ..' * (len(differing) > 4)}; plans are "
            "not changed: choose another folder (--reuse takes over what did not change)."
        )


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = dict.fromkeys([*a, *b])
        return [one for key in keys for one in differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)]
    return [] if a == b else [name.removeprefix("definition.")]
