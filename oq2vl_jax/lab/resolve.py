"""Configurations of the stages of an ablation, with the changes of an arm; what cannot run is found here."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from oq2vl_jax.config import PARTS, TrainConfig
from oq2vl_jax.config_files import flatten, load_config, with_values
from oq2vl_jax.errors import UserError, hint
from oq2vl_jax.lab.definition import Ablation

SET_BY_THE_LAB = ("run_dir", "seed", "init_from")
EVERY_STAGE = "*"


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
    models = (flatten(config.model.spelled_out()) for config in (before, after))
    a, b = ({key: value for key, value in model.items() if key not in free} for model in models)
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
