"""DIR/plan.json: the plan of an ablation, written before the first run and never changed (the pre-registration)."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from oq2vl_jax import paths
from oq2vl_jax.config import TrainConfig
from oq2vl_jax.config_files import from_dict
from oq2vl_jax.errors import UserError
from oq2vl_jax.lab.definition import Ablation, Task
from oq2vl_jax.lab.plan import Arm, Plan, StepWork

PLAN = "plan.json"


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
    others = [name for name, arm in arms.items() if saved["arms"][name].get("hash", arm.hash) != arm.hash]
    if others:
        raise UserError(
            f"{where}: was written by an earlier version, which named the folders of {', '.join(others)} otherwise; go "
            "on with that version, or choose another folder."
        )
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
