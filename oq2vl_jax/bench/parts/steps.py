"""Part c: measures the largest form of the train step that fits, then one change at a time. Also two steps of part e.

The whole model with the configured rows is used if the compiled program fits, else fewer rows, else fewer layers. A CPU
uses one row and a quarter of the layers, to save time. A step with fewer layers says so, and reports its tokens/s as
measured and scaled by FLOPs to all layers. Part f profiles the step of part c.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from oq2vl_jax.bench.parts.setting import GIB, Setting, Skipped, prediction, small_rows
from oq2vl_jax.config import TrainConfig
from oq2vl_jax.config_files import from_dict, load_config
from oq2vl_jax.devices import Device, Rates

ROWS_PER_STEP, ROWS_OF_OTHERS = 16, 4
LAYER_SHARES = (3 / 4, 1 / 2, 1 / 4, 1 / 8)
CPU_LAYER_SHARE = 1 / 4
WARMUP_STEPS, NUM_STEPS = 1, 3

VARIANTS: dict[str, Callable[[TrainConfig], TrainConfig]] = {
    "remat": lambda config: dataclasses.replace(config, remat="dots" if config.remat == "none" else "none"),
    "gate_up": lambda config: with_execution(config, gate_up="apart"),
    "layers": lambda config: with_execution(config, layers="scan"),
    "rows_half": lambda config: with_rows(config, 0.5),
    "rows_double": lambda config: with_rows(config, 2),
    "tiles_128x64": lambda config: with_execution(config, tiles="128x64"),
    "tiles_128x128": lambda config: with_execution(config, tiles="128x128"),
    "attention": lambda config: dataclasses.replace(
        config, attention="xla" if config.attention == "blocked" else "blocked"
    ),
}
"""Changes, measured one at a time: first those with a gain in bench plan (docs/experiments.md: remat none 2.8 %, gate
and up apart 1.3 %), then those that only a GPU can judge. Worse forms are measured too, to judge the roofline."""


def measure(setting: Setting) -> dict[str, Any]:
    """Measures the step of the configuration; other parts start from the form that it settled on."""
    whole = load_config(setting.config)
    config, compiled, tried = settled(whole, ROWS_PER_STEP, setting.is_gpu)
    return {"tried": tried} | step_figures(setting, config, compiled, whole, "step")


def variant(setting: Setting, name: str) -> dict[str, Any]:
    """Measures the step with one change. Raises Skipped if it has no effect here or cannot divide the step's rows."""
    base = settled_config(setting)
    changed = VARIANTS[name](base)
    if changed == base or (name.startswith("tiles") and base.attention != "kernel"):
        raise Skipped("it changes nothing here" if changed == base else "the attention kernel is not used here")
    if changed.global_batch_size % (changed.rows_per_device or 1):
        raise Skipped(f"{changed.rows_per_device} rows do not divide the {changed.global_batch_size} of a step")
    result = step_figures(setting, changed, compiled_here(changed), load_config(setting.config), name)
    before = setting.figures_of("step")
    if "tokens_per_second" in result and before:
        result["times_as_fast"] = result["tokens_per_second"] / before["tokens_per_second"]
    return result


def sft(setting: Setting) -> dict[str, Any]:
    """Measures the step of configs/sft_llava.py; on a CPU, the report's configuration with a visual token per patch."""
    whole = load_config("configs/sft_llava.py" if setting.is_gpu else setting.config)
    model = dataclasses.replace(whole.model, num_visual_tokens=whole.model.vision.num_patches)
    return other(setting, dataclasses.replace(whole, model=model), "sft")


def full_pretrain(setting: Setting) -> dict[str, Any]:
    """Measures the step of configs/full_pretrain.py; on a CPU, the report's configuration with a trained encoder."""
    whole = load_config("configs/full_pretrain.py" if setting.is_gpu else setting.config)
    trainable = dataclasses.replace(whole.trainable, vision=True)
    return other(setting, dataclasses.replace(whole, trainable=trainable), "full_pretrain")


def other(setting: Setting, whole: TrainConfig, name: str) -> dict[str, Any]:
    config, compiled, tried = settled(whole, ROWS_OF_OTHERS, setting.is_gpu)
    return {"tried": tried} | step_figures(setting, config, compiled, whole, name)


def with_execution(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, execution=dataclasses.replace(config.execution, **changes))


def with_rows(config: TrainConfig, factor: float) -> TrainConfig:
    rows = int((config.rows_per_device or config.global_batch_size) * factor)
    return dataclasses.replace(config, rows_per_device=max(1, min(rows, config.global_batch_size)))


def settled_config(setting: Setting) -> TrainConfig:
    """Returns the configuration that part c settled on. Raises Skipped if part c has not run."""
    figures = setting.figures_of("step")
    if figures is None:
        raise Skipped("it changes the step of part c, which has not run")
    return from_dict(TrainConfig, figures["config"], where="the step's figures")


def compiled_here(config: TrainConfig) -> Any:
    """Compiles the step for this device; returns bench.compiled.Compiled."""
    from oq2vl_jax.bench.compiled import compile_step
    from oq2vl_jax.sharding import make_mesh

    return compile_step(config, make_mesh(config.mesh))


def settled(whole: TrainConfig, num_rows: int, is_gpu: bool) -> tuple[TrainConfig, Any, list[dict[str, Any]]]:
    """Returns (the first form that fits, its compiled step, the forms tried before it), with the attention checked."""
    from oq2vl_jax.bench.step import check
    from oq2vl_jax.sharding import make_mesh
    from oq2vl_jax.train.attention_choice import checked_compute

    config = small_rows(whole, num_rows if is_gpu else 1)
    mesh, limit, tried = make_mesh(config.mesh), usable_bytes(), []
    check(config, mesh.size)
    config = dataclasses.replace(config, attention=checked_compute(config, mesh).attention)
    if not is_gpu:
        config = with_layers(config, CPU_LAYER_SHARE)
    for candidate in smaller_and_smaller(config):
        compiled = compiled_here(candidate)
        if limit is None or compiled.memory.peak <= limit:
            return candidate, compiled, tried
        tried.append(described(candidate) | {"planned_gib": compiled.memory.peak / GIB, "usable_gib": limit / GIB})
    raise Skipped(f"even an eighth of the layers needs more than the {(limit or 0) / GIB:.1f} GiB of this device")


def smaller_and_smaller(config: TrainConfig) -> Iterator[TrainConfig]:
    rows = config.rows_per_device or config.global_batch_size
    while rows >= 1:
        yield dataclasses.replace(config, rows_per_device=rows)
        rows //= 2
    for share in LAYER_SHARES:
        yield with_layers(dataclasses.replace(config, rows_per_device=1), share)


def with_layers(config: TrainConfig, share: float) -> TrainConfig:
    """Returns the configuration with a share of the decoder's layers, at least one."""
    decoder = config.model.decoder
    decoder = dataclasses.replace(decoder, num_layers=max(1, int(share * decoder.num_layers)))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder))


def usable_bytes() -> int | None:
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def described(config: TrainConfig) -> dict[str, Any]:
    """Returns the options in which two forms of a step differ."""
    return {
        "remat": config.remat, "attention": config.attention, "rows_per_microbatch": config.rows_per_device,
        "gate_up": config.execution.gate_up, "layers": config.execution.layers, "tiles": config.execution.tiles,
        "num_layers": config.model.decoder.num_layers,
    }  # fmt: skip


def step_figures(setting: Setting, config: TrainConfig, compiled: Any, whole: TrainConfig, name: str) -> dict[str, Any]:
    """Measures a step and adds its planned memory and roofline. whole: the configuration with all its layers.

    A form is not run if its compiled program does not fit; the figures then hold the memory that it needs.
    """
    from oq2vl_jax.bench.step import figures, start, timed_steps
    from oq2vl_jax.sharding import make_mesh

    mesh, limit = make_mesh(config.mesh), usable_bytes()
    about = described(config) | {"config": dataclasses.asdict(config), "of_layers": whole.model.decoder.num_layers}
    if limit is not None and compiled.memory.peak > limit:
        return about | {"does_not_fit_gib": compiled.memory.peak / GIB, "usable_gib": limit / GIB}
    rows, state, batch = start(config, mesh, seed=0)
    warmup, number = (WARMUP_STEPS, NUM_STEPS) if setting.is_gpu else (1, 1)
    state, losses, seconds = timed_steps(compiled.executable, state, batch, warmup + number)
    result = about | figures(config, mesh, compiled, rows, losses, seconds[warmup:])
    rates = setting.rates()
    result |= {
        "roofline_seconds": roofline_seconds(config, compiled, rows, rates),
        "device_name": rates.name if isinstance(rates, Device) else None,
    }
    if config.model.decoder.num_layers < whole.model.decoder.num_layers:
        result["scaled_tokens_per_second"] = result["tokens_per_second"] * flops_share(config, whole)
    return result | {"predictions": predictions(result, name)}


def roofline_seconds(config: TrainConfig, compiled: Any, rows: Any, rates: Device | Rates) -> float:
    return sum(kernel.seconds for kernel in kernels_of_step(config, compiled, rows, rates))


def kernels_of_step(config: TrainConfig, compiled: Any, rows: Any, rates: Device | Rates) -> list[Any]:
    """Returns the kernels of a compiled step on these rows, with roofline times."""
    from oq2vl_jax.bench.floor import kernels_of
    from oq2vl_jax.train.metrics import work_of

    work = work_of(rows, config)
    row = type(work)(*(value / config.global_batch_size for value in work))
    return kernels_of(config, row, config.rows_per_device or config.global_batch_size, compiled, rates)


def flops_share(config: TrainConfig, whole: TrainConfig) -> float:
    """Returns the FLOPs of a row with fewer layers divided by those of the whole model."""
    from oq2vl_jax.train.flops import executed_flops, typical_row

    row = typical_row(config)
    return executed_flops(config, row, 1, 1).total / executed_flops(whole, row, 1, 1).total


def predictions(figures: dict[str, Any], name: str) -> list[dict[str, Any]]:
    rows = [prediction(f"{name}: seconds", "s", figures["roofline_seconds"], figures["step_seconds"])]
    if figures["peak_memory_gib"]:
        rows.append(prediction(f"{name}: peak", "GiB", figures["planned_memory_gib"], figures["peak_memory_gib"]))
    return rows


def profile(setting: Setting) -> dict[str, Any]:
    """Part f: profiles some steps; returns the ten longest kernels beside their roofline, and the idle share."""
    import jax

    from oq2vl_jax.bench.breakdown import idle_share, operation_seconds, traced
    from oq2vl_jax.bench.step import start
    from oq2vl_jax.sharding import make_mesh

    config, number = settled_config(setting), 10 if setting.is_gpu else 1
    compiled = compiled_here(config)
    rows, state, batch = start(config, make_mesh(config.mesh), seed=0)
    state, metrics = compiled.executable(state, batch)
    float(metrics.loss)

    def steps() -> None:  # as training runs them: no step waits for the loss of the one before
        nonlocal state
        for _ in range(number):
            state, _ = compiled.executable(state, batch)
        jax.block_until_ready(state)

    trace = traced(steps)
    seconds = {operation: total / number for operation, total in operation_seconds(trace).items()}
    kernels = kernels_of_step(config, compiled, rows, setting.rates())
    measured = [(sum(seconds.get(name, 0.0) for name in kernel.instructions), kernel) for kernel in kernels]
    listed = sorted(measured, key=lambda pair: -pair[0])[:10]
    known = {name for kernel in kernels for name in kernel.instructions}
    return {
        "num_steps": number,
        "idle_share": idle_share(trace),
        "seconds_per_step": sum(seconds.values()),
        "seconds_of_operations_not_in_the_program": sum(t for name, t in seconds.items() if name not in known),
        "kernels": [
            {"kernel": f"{kernel.name} {kernel.shape[:50]}", "kind": kernel.kind, "runs": round(kernel.times),
             "roofline_ms": 1e3 * kernel.seconds, "measured_ms": 1e3 * spent}
            for spent, kernel in listed
        ],
        "predictions": [
            prediction(f"kernel {kernel.name} {kernel.shape[:30]}", "ms", 1e3 * kernel.seconds, 1e3 * spent)
            for spent, kernel in listed if kernel.seconds > 0 and spent > 0
        ],
    }  # fmt: skip
