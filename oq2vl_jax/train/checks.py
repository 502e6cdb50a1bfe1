"""Checks a run before it starts: configuration, run directory, initial weights, memory."""

from pathlib import Path
from typing import Any

from oq2vl_jax import own_code, paths
from oq2vl_jax.bounds import out_of_bounds
from oq2vl_jax.config import PARTS, ModelConfig, ProjectorConfig, TrainConfig
from oq2vl_jax.config_files import flatten, load_config, names_of_role
from oq2vl_jax.errors import UserError
from oq2vl_jax.memory import check_fits, host_bytes
from oq2vl_jax.sharding import device_bytes

OWN_CODE = ("loss.own", "optimizer.own", "schedule.own", "model.projector.own")
"""Fields that name code outside the package."""


def model_of(init_from: str | None, run_dir: str) -> ModelConfig:
    """Returns the model of a configuration that leaves it out: that of its run directory, else of what it starts from.

    Raises UserError if there is none, or if it has a projector of the researcher's own, whose file must be named.
    """
    from oq2vl_jax.checkpoint import find_checkpoint, load_description

    file = paths.join(run_dir, "config.json")
    if paths.exists(file):
        return load_config(file).model
    if init_from is None:
        raise UserError("the configuration has no model; give --init-from, whose model it takes.")
    model = load_description(find_checkpoint(init_from, ("config", "description"))).model
    if model.projector.own is not None:
        raise UserError(
            f"{init_from}: was trained with {model.projector.own}; bind a model that names it in projector.own."
        )
    return model


def check_config(config: TrainConfig, num_devices: int) -> None:
    """Raises UserError if a configuration cannot run on num_devices; lists all problems."""
    problems = [f"{name} must be {bounds}, got {value}" for name, bounds, value in out_of_bounds(config)]
    rows = config.global_batch_size
    if rows % num_devices:
        problems.append(
            f"global_batch_size = {rows} cannot be divided over {num_devices} devices; use a multiple of {num_devices}"
        )
    elif config.rows_per_device is not None and rows % (config.rows_per_device * num_devices):
        problems.append(
            f"rows_per_device = {config.rows_per_device} on {num_devices} devices does not divide "
            f"global_batch_size = {rows}"
        )
    problems += lora_problems(config)
    if not config.trained_parts:
        problems.append("trainable: nothing is trained; set one of vision, projector, decoder")
    problems += config.data.problems() + config.schedule.problems()
    images = config.data.online.images
    if images is not None and not Path(images).is_dir():
        problems.append(f"data.online.images: no folder {images}")
    by_part = {"optimizer": "learning_rate", "schedule": "warmup_fraction"}
    problems += [
        f"{section}.{part}_{name} is set, but {part} is not trained"
        for section, name in by_part.items()
        for part in PARTS
        if getattr(getattr(config, section), f"{part}_{name}") is not None and part not in config.trained_parts
    ]
    problems += config.loss.problems() + config.optimizer.problems()
    if config.model.projector.own is not None and config.model.projector.kind != ProjectorConfig.kind:
        problems.append("model.projector.own replaces model.projector.kind; set one or the other")
    if not config.init_parts:
        problems.append("init_parts names no part")
    if config.init_optimizer and not set(config.trained_parts) <= set(config.init_parts):
        problems.append("init_optimizer takes the moments of all trained parts; init_parts lacks some of them")
    if config.init_from is None and (config.init_optimizer or config.init_parts != PARTS):
        name = "init_optimizer" if config.init_optimizer else "init_parts"
        problems.append(f"{name} is set, but init_from is not")
    if problems:
        raise UserError("; ".join(problems) + ".")


def lora_problems(config: TrainConfig) -> list[str]:
    """Returns what a run with adapters cannot start with."""
    problems = config.lora.problems()
    if config.lora.rank is None:
        return problems
    if config.init_from is None:
        problems.append("lora.rank is set, but init_from is not: adapters change the weights of a checkpoint")
    if config.init_parts != PARTS:
        problems.append("lora.rank with init_parts: the base of adapters is a whole checkpoint")
    if config.init_optimizer:
        problems.append("lora.rank with init_optimizer: adapters begin without moments")
    return problems


def check_run_dir(config: TrainConfig, run_dir: Path, has_checkpoint: bool) -> None:
    """Raises UserError if a run with a checkpoint has another configuration; operational fields may differ. run_dir:
    the local one."""
    file = run_dir / "config.json"
    if not has_checkpoint:
        return
    if not file.exists():
        raise UserError(
            f"run_dir {config.run_dir} holds converted weights; name it in --init-from, and choose another --run-dir."
        )
    saved, current = flatten(load_config(str(file))), flatten(config)
    check_own_code(saved, current, config.run_dir)
    operational = {*names_of_role(TrainConfig, "operational"), *OWN_CODE}
    changed = [
        f"{key}: {saved.get(key)} there, {current.get(key)} now"
        for key in dict.fromkeys((*current, *saved))
        if key not in operational and (key not in saved or key not in current or saved[key] != current[key])
    ]
    if changed:
        raise UserError(
            f"run_dir {config.run_dir} holds a run of another configuration ({'; '.join(changed)}); "
            "choose another --run-dir."
        )


def check_own_code(saved: dict[str, Any], current: dict[str, Any], run_dir: str) -> None:
    """Raises UserError if a run goes on with another loss, optimizer or projector of the researcher's own."""
    for key in OWN_CODE:
        if not own_code.same(saved.get(key), current[key]):
            then, now = saved.get(key) or "ours", current[key] or "ours"
            raise UserError(
                f"run_dir {run_dir} was begun with {key} = {then}, and now it is {now}; go on with the file as it was, "
                "or choose another --run-dir."
            )


def check_same_model(source: Path, config: TrainConfig) -> None:
    """Raises UserError if the parts of init_parts compute differently there (activation, rotary frequencies, ...).

    Equal shapes do not show this. num_visual_tokens may differ, because the weights of average pooling do not depend on
    the resolution; so may fields that only affect initial weights.
    """
    from oq2vl_jax.checkpoint import load_description

    saved, current = (flatten(model.spelled_out()) for model in (load_description(source).model, config.model))
    free = {"num_visual_tokens", "projector.own", *names_of_role(ModelConfig, "initial")}
    free |= {key for key in current if key.split(".")[0] in PARTS and key.split(".")[0] not in config.init_parts}
    changed = [key for key in current if key not in free and saved[key] != current[key]]
    own = "projector.own"
    if "projector" in config.init_parts and not own_code.same(saved[own], current[own]):
        changed.append(own)
    if changed:
        differences = "; ".join(f"model.{key} is {saved[key]} there, {current[key]} here" for key in changed)
        flags = " ".join(f"--model.{key.replace('_', '-')} {saved[key]}" for key in changed)
        raise UserError(f"init_from {source}: its model computes otherwise: {differences}. To go on as there: {flags}")


def row_bytes(config: TrainConfig) -> int:
    """Returns the bytes of one row of a Batch: four int32 per token, and the pixels of every image slot."""
    size, data = config.model.vision.image_size, config.data
    return data.num_tokens * 4 * 4 + data.max_images * size * size * 3


def check_memory(config: TrainConfig, mesh: Any) -> None:
    """Raises UserError if a lower bound of the memory does not fit: prefetched batches on this machine; weights,
    optimizer state and a batch on each device. Activations and gradients are not counted.
    """
    import jax

    from oq2vl_jax.data.loading.batch import NUM_PREFETCHED_BATCHES
    from oq2vl_jax.sharding import bytes_per_device
    from oq2vl_jax.train.step import shapes_with, state_shardings

    rows = config.global_batch_size // jax.process_count()
    item = f"{NUM_PREFETCHED_BATCHES + 1} batches of {rows:,} rows"
    num_bytes = (NUM_PREFETCHED_BATCHES + 1) * rows * row_bytes(config)
    remedy = "take a smaller global_batch_size, data.num_tokens or data.max_images"
    check_fits(item, num_bytes, host_bytes(), "this machine", remedy)
    state = shapes_with(config, state_shardings(config, mesh))
    num_bytes = bytes_per_device(state, jax.tree.map(lambda x: x.sharding, state))
    num_bytes += config.global_batch_size // mesh.size * row_bytes(config)
    item = "the share of weights, optimizer state and a batch of one device"
    check_fits(item, num_bytes, device_bytes(), "it", "take a smaller model or more devices")
