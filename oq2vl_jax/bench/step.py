"""Measures the train step of oq2vl_jax.train alone, on synthetic rows with realistic lengths.

    python -m oq2vl_jax.bench step configs/pretrain.py --global-rows 16 --profile trace

It needs neither data nor grain, only jax, flax, optax and the pure-Python packages that the model and the command line
import (jaxtyping, tyro). FLOPs are those of train/flops.py; MFU needs a GPU of oq2vl_jax/devices.py.
"""

import dataclasses
import statistics
import time
from dataclasses import dataclass
from typing import Any, Literal

from tyro.conf import Positional

from oq2vl_jax.bounds import Count, CountOrZero, Seed, SmallCount, check_bounds
from oq2vl_jax.config import Attention, OnlineConfig, TrainConfig
from oq2vl_jax.config_files import load_config
from oq2vl_jax.runtime import set_environment


@dataclass(frozen=True)
class Step:
    """Tokens/s, images/s, MFU, memory and breakdown of the train step, on the devices that are here."""

    config: Positional[str] = "configs/pretrain.py"
    """A file of configs/, or a resolved config.json."""
    global_rows: SmallCount | None = None
    """Rows in an optimizer step over all devices; None: as configured."""
    rows_per_device: SmallCount | None = None
    """Rows per microbatch; None: as configured."""
    remat: Literal["none", "dots", "attention", "full"] | None = None
    attention: Attention | Literal["auto"] | None = None
    sharding: Literal["zero1", "fsdp"] | None = None
    num_steps: Count = 5
    warmup_steps: CountOrZero = 2
    profile: str | None = None
    """Folder for a trace of two steps (TensorBoard's profiler or Perfetto read it)."""
    breakdown: bool = True
    seed: Seed = 0
    json: bool = False


OPTIONS = Step


def measure(options: Step) -> dict[str, Any]:
    """Returns the figures of the step, with the device and the options that they were measured with."""
    check_bounds(options, as_flags=True)
    set_environment()
    config = configured(options)
    from oq2vl_jax.bench.compiled import compile_step
    from oq2vl_jax.sharding import make_mesh
    from oq2vl_jax.train.attention_choice import checked_compute
    from oq2vl_jax.train.checks import check_memory

    mesh = make_mesh(config.mesh)
    check(config, mesh.size)
    config = dataclasses.replace(config, attention=checked_compute(config, mesh).attention)
    check_memory(config, mesh)
    compiled = compile_step(config, mesh)
    rows, state, batch = start(config, mesh, options.seed)
    state, losses, seconds = timed_steps(compiled.executable, state, batch, options.warmup_steps + options.num_steps)
    result = figures(config, mesh, compiled, rows, losses, seconds[options.warmup_steps :])
    if options.breakdown or options.profile:
        result["breakdown"] = profiled(compiled.executable, state, batch, options.profile)
    return result


def start(config: TrainConfig, mesh: Any, seed: int) -> tuple[Any, Any, Any]:
    """Returns (rows on the host, a fresh train state, the rows on the devices)."""
    import jax

    from oq2vl_jax.bench.synthetic_rows import make_rows
    from oq2vl_jax.sharding import to_global_batch
    from oq2vl_jax.train.step import init_train_state, state_shardings

    rows, shardings = make_rows(config, config.global_batch_size, seed), state_shardings(config, mesh)
    state = jax.jit(lambda key: init_train_state(key, config), out_shardings=shardings)(jax.random.key(seed))
    return rows, state, to_global_batch(rows, mesh)


def figures(
    config: TrainConfig, mesh: Any, compiled: Any, rows: Any, losses: list[float], seconds: list[float]
) -> dict[str, Any]:
    """Returns the figures of some timed steps on `rows`. compiled: bench.compiled.Compiled. seconds: of each step."""
    import jax

    from oq2vl_jax.devices import device_of_kind
    from oq2vl_jax.train.flops import executed_flops, model_flops
    from oq2vl_jax.train.gradients import rows_per_device
    from oq2vl_jax.train.metrics import work_of

    work, median, kind = work_of(rows, config), statistics.median(seconds), jax.devices()[0].device_kind
    needed = model_flops(config, work)
    executed = executed_flops(config, work, rows_per_device(config, mesh), config.global_batch_size)
    device, memory = device_of_kind(kind), jax.local_devices()[0].memory_stats() or {}
    return {
        "device": f"{mesh.size} x {kind}",
        "jax": jax.__version__,
        "rows_per_step": config.global_batch_size,
        "rows_per_microbatch": rows_per_device(config, mesh),
        "remat": config.remat,
        "attention": config.attention,
        "sharding": config.mesh.sharding,
        "compile_seconds": round(compiled.compile_seconds, 1),
        "step_seconds": median,
        "step_seconds_all": [round(x, 4) for x in seconds],
        "first_loss": losses[0],
        "fill": work.tokens / rows.tokens.size,
        "tokens_per_second": work.tokens / median,
        "images_per_second": work.images / median,
        "model_tflops": needed.total / median / 1e12,
        "executed_tflops": executed.total / median / 1e12,
        "mfu": needed.total / median / mesh.size / device.peak_flops if device else None,
        "planned_memory_gib": compiled.memory.peak / 2**30,
        "peak_memory_gib": memory["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in memory else None,
    }


def timed_steps(step: Any, state: Any, batch: Any, number: int) -> tuple[Any, list[float], list[float]]:
    """Runs `number` steps and waits for the loss of each; returns (last state, losses, seconds)."""
    seconds, losses = [], []
    for _ in range(number):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
        seconds.append(time.perf_counter() - start)
    return state, losses, seconds


def configured(options: Step) -> TrainConfig:
    """Returns the configuration with the options applied; weights are random, no checkpoint is read or written."""
    config = load_config(options.config)
    changes = {
        "global_batch_size": options.global_rows,
        "rows_per_device": options.rows_per_device,
        "remat": options.remat,
        "attention": options.attention,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if options.sharding:
        changes["mesh"] = dataclasses.replace(config.mesh, sharding=options.sharding)
    return dataclasses.replace(config, init_from=None, run_dir="", **changes)


def check(config: TrainConfig, num_devices: int) -> None:
    """Checks the configuration, except for its data, which is not used."""
    from oq2vl_jax.train.checks import check_config

    data = dataclasses.replace(config.data, kind="synthetic", sources=(), weights=(), online=OnlineConfig())
    base = config.init_from or ("a base" if config.lora.rank is not None else None)
    check_config(dataclasses.replace(config, data=data, init_from=base), num_devices)


def profiled(step: Any, state: Any, batch: Any, folder: str | None) -> dict[str, float]:
    from oq2vl_jax.bench.breakdown import breakdown

    def two_steps() -> None:
        nonlocal state
        for _ in range(2):
            state, metrics = step(state, batch)
            float(metrics.loss)

    return {part: round(share, 4) for part, share in breakdown(two_steps, step.as_text(), folder).items()}


def show(result: dict[str, Any]) -> None:
    """Prints one line per figure."""
    for name, value in result.items():
        if name == "breakdown":
            shares = "  ".join(f"{part} {100 * share:.1f} %" for part, share in value.items())
            print(f"{'breakdown':22s} {shares}")
        elif value is None:
            print(f"{name:22s} not known for this device")
        else:
            print(f"{name:22s} {value:,.4g}" if isinstance(value, float) else f"{name:22s} {value}")
