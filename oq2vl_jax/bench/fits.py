"""Tells which models fit which GPUs, none of which need be here: the peak of the form that takes least memory.

    python -m oq2vl_jax.bench fits configs/pretrain.py ladder/m --decoders Qwen2.5-3B Qwen3-8B
    python -m oq2vl_jax.bench fits configs/sft_llava.py --decoders Qwen2.5-7B --changes lora.rank=16

compiles the real train step (bench/compiled.py) of every model with one row at a time and everything recomputed, on
several GPUs with sharding fsdp, and with adapters also with the layers by scan, which keeps one copy of the frozen
weights instead of two. Whatever does not fit so does not fit at all; bench plan finds the fastest form of what does.
Nothing is timed.
"""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tyro.conf import Positional

from oq2vl_jax.bench.plan import mesh_shape, prepare_jax, with_files_loaded
from oq2vl_jax.bounds import SmallCount, check_bounds
from oq2vl_jax.config import TrainConfig
from oq2vl_jax.config.backbones import DECODERS
from oq2vl_jax.config_files import load_config, with_changes
from oq2vl_jax.devices import Device, find_device
from oq2vl_jax.errors import UserError, hint


@dataclass(frozen=True)
class Fits:
    """Compile the step that takes least memory for absent GPUs, and say what fits."""

    configs: Positional[tuple[str, ...]]
    """Files of configs/, or resolved config.json."""
    decoders: tuple[str, ...] = ()
    """Decoders to put into each of them, by name (oq2vl_jax/config/backbones.py); none: its own."""
    changes: tuple[str, ...] = ()
    """Values to replace, such as lora.rank=16."""
    devices: tuple[str, ...] = ("rtx-4090", "a100-40g", "a100-80g")
    num_devices: tuple[SmallCount, ...] = (1, 8)
    json: bool = False


OPTIONS = Fits
LAYERS = Literal["one_by_one", "scan"]


def measure(options: Fits) -> list[dict[str, Any]]:
    """Returns a row per model and number of GPUs: peak GiB on each kind of GPU, and whether that fits."""
    check_bounds(options, as_flags=True)
    devices = [find_device(name) for name in options.devices]
    models = [model for path in options.configs for model in models_of(path, options)]
    prepare_jax(devices[0], max(options.num_devices))
    rows = []
    for name, config in models:
        for number in options.num_devices:
            peaks = peaks_of(with_files_loaded(config), devices, number)
            rows.append({"model": name, "parameters": num_parameters(config), "gpus": number, **peaks})
            if not options.json:
                print(f"  {name}, {number}: {peaks}", file=sys.stderr, flush=True)
    return rows


def models_of(path: str, options: Fits) -> list[tuple[str, TrainConfig]]:
    config = with_changes(load_config(path), options.changes, "--changes")
    unknown = [name for name in options.decoders if name not in DECODERS]
    if unknown:
        raise UserError(
            f"--decoders {unknown[0]}: not in the table{hint(unknown[0], DECODERS)}; there are {', '.join(DECODERS)}."
        )
    if not options.decoders:
        return [(path, config)]
    if replaced := [change for change in options.changes if change.startswith("model.decoder.")]:
        raise UserError(
            f"--changes {replaced[0]} would be lost: --decoders replaces the whole decoder; give one of them."
        )
    model = config.model
    return [
        (f"{path} with {name}", dataclasses.replace(config, model=dataclasses.replace(model, decoder=DECODERS[name])))
        for name in options.decoders
    ]


def peaks_of(config: TrainConfig, devices: list[Device], number: int) -> dict[str, str]:
    """Returns the peak of each kind of GPU, and whether it fits; GPUs of one compute capability share a compilation."""
    from oq2vl_jax.bench.compiled import compile_step, mesh_of

    least = dataclasses.replace(
        config,
        remat="full",
        rows_per_device=1,
        global_batch_size=2 * number,  # gradients are accumulated, as in a real step
        mesh=dataclasses.replace(config.mesh, sharding="fsdp" if number > 1 else "zero1"),
    )
    layers: tuple[LAYERS, ...] = ("one_by_one",) if config.lora.rank is None else get_args(LAYERS)
    forms = {
        each: dataclasses.replace(least, execution=dataclasses.replace(least.execution, layers=each)) for each in layers
    }
    peaks, found = {}, {}
    for device in devices:
        if device.capability not in peaks:
            mesh = mesh_of(device, number, *mesh_shape(least, number))
            peaks[device.capability] = min((compile_step(form, mesh).memory.peak, name) for name, form in forms.items())
        peak, name = peaks[device.capability]
        verdict = "fits" if peak <= device.usable_bytes else "no"
        by = "" if name == "one_by_one" else ", layers by scan"
        found[device.name] = f"{peak / 2**30:.1f} of {device.usable_bytes / 2**30:.1f} GiB{by}: {verdict}"
    return found


def num_parameters(config: TrainConfig) -> str:
    import math

    import jax

    from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL

    shapes = jax.eval_shape(lambda: OpenQwen2VL(jax.random.key(0), config.model))
    return f"{sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) / 1e9:.2f} B"
