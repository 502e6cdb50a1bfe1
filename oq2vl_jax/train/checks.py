"""What can be wrong with a run before it starts: the configuration, the run directory, the weights it starts from."""

from pathlib import Path
from typing import Any

from oq2vl_jax.bounds import out_of_bounds
from oq2vl_jax.config import ModelConfig, TrainConfig
from oq2vl_jax.config_files import flatten, load_config, names_of_role
from oq2vl_jax.errors import UserError
from oq2vl_jax.memory import check_fits, host_bytes
from oq2vl_jax.paths import check_local
from oq2vl_jax.sharding import device_bytes


def check_config(config: TrainConfig, num_devices: int) -> None:
    """What can be wrong with a configuration on these devices; every problem is reported."""
    check_local_paths(config)
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
    if not config.trainable.parts:
        problems.append("trainable: nothing is trained; set one of vision, projector, decoder")
    if not config.data.sources and not config.data.synthetic_documents:
        problems.append("data.sources is empty")
    if config.data.packing == "online" and (config.data.tokenizer is None or config.data.weights):
        problems.append("data.packing = online needs data.tokenizer, and mixes no weights")
    if config.data.packing == "online" and config.data.synthetic_documents:
        problems.append("data.synthetic_documents makes packed rows; set it to 0 for data.packing = online")
    if config.data.images is not None and not Path(config.data.images).is_dir():
        problems.append(f"data.images: no folder {config.data.images}")
    rates = ("vision", "projector", "decoder")
    own = {name: getattr(config.optimizer, f"{name}_learning_rate") for name in rates}
    problems += [
        f"optimizer.{name}_learning_rate is set, but trainable.{name} is not"
        for name, rate in own.items()
        if rate is not None and name not in config.trainable.parts
    ]
    if problems:
        raise UserError("; ".join(problems) + ".")


def check_local_paths(config: TrainConfig) -> None:
    """A run is written and its packed rows are read here; samples that are packed while training may be elsewhere."""
    check_local("run_dir", config.run_dir)
    check_local("init_from", config.init_from)
    for source in (*(config.data.sources if config.data.packing == "offline" else ()), *config.held_out.sources):
        check_local("data.sources", source)


def check_run_dir(config: TrainConfig, has_checkpoint: bool) -> None:
    """A run with a checkpoint can only be resumed with its own configuration; one without has nothing to lose."""
    file = Path(config.run_dir) / "config.json"
    if not has_checkpoint:
        return
    if not file.exists():
        raise UserError(
            f"run_dir {config.run_dir} holds converted weights; name it in --init-from, and choose another --run-dir."
        )
    there, here = flatten(load_config(str(file))), flatten(config)
    operational = names_of_role(TrainConfig, "operational")
    changed = [
        f"{key}: {there.get(key)} there, {value} now"
        for key, value in here.items()
        if key not in operational and there.get(key) != value
    ]
    if changed:
        raise UserError(
            f"run_dir {config.run_dir} holds a run of another configuration ({'; '.join(changed)}); "
            "choose another --run-dir."
        )


def check_same_model(source: Path, config: TrainConfig) -> None:
    """Weights of the right shapes still belong to one activation, one set of rotary frequencies, ...

    The number of visual tokens may change, as the projector's weights are the same at every resolution, and what
    decides fresh weights alone.
    """
    from oq2vl_jax.checkpoint import load_description

    there, here = flatten(load_description(source).model), flatten(config.model)
    free = {"num_visual_tokens", *names_of_role(ModelConfig, "initial")}
    changed = [key for key in here if key not in free and there[key] != here[key]]
    if changed:
        differences = "; ".join(f"model.{key} is {there[key]} there, {here[key]} here" for key in changed)
        flags = " ".join(f"--model.{key.replace('_', '-')} {there[key]}" for key in changed)
        raise UserError(f"init_from {source}: its model computes otherwise: {differences}. To go on as there: {flags}")


def row_bytes(config: TrainConfig) -> int:
    """Of one row of a Batch: four int32 a token, and the pixels of every image slot."""
    size, data = config.model.vision.image_size, config.data
    return data.num_tokens * 4 * 4 + data.max_images * size * size * 3


def check_memory(config: TrainConfig, mesh: Any) -> None:
    """Raises UserError where what is certain to be needed does not fit: batches that wait on this machine, and
    weights, optimizer state and a batch on each device. Activations and gradients come on top.
    """
    import jax

    from oq2vl_jax.data.loading.batch import NUM_PREFETCHED_BATCHES
    from oq2vl_jax.sharding import bytes_per_device
    from oq2vl_jax.train.step import shapes_with, state_shardings

    rows = config.global_batch_size // jax.process_count()
    what = f"{NUM_PREFETCHED_BATCHES + 1} batches of {rows:,} rows"
    num_bytes = (NUM_PREFETCHED_BATCHES + 1) * rows * row_bytes(config)
    remedy = "take a smaller global_batch_size, data.num_tokens or data.max_images"
    check_fits(what, num_bytes, host_bytes(), "this machine", remedy)
    state = shapes_with(config, state_shardings(config, mesh))
    num_bytes = bytes_per_device(state, jax.tree.map(lambda x: x.sharding, state))
    num_bytes += config.global_batch_size // mesh.size * row_bytes(config)
    what = "the share of weights, optimizer state and a batch of one device"
    check_fits(what, num_bytes, device_bytes(), "it", "take a smaller model or more devices")
