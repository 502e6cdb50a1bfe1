"""Plans a configuration for GPUs that are not here: memory, communication and lower bounds of its time.

    python -m oq2vl_jax.bench plan configs/pretrain.py --device a100-40g --num-devices 8

compiles the real train step (bench/compiled.py), then tries which rows per microbatch, recomputation and sharding fit,
and prints the command line of the best. It prints two times to compare a run with: the FLOPs at the device's peak
("floor", by the formula of train/flops.py) and the roofline of the compiled program (bench/roofline.py), both without
communication. Nothing is timed.
"""

import dataclasses
import os
import sys
from dataclasses import dataclass
from typing import Any, Literal

from tyro.conf import Positional

from oq2vl_jax.bounds import CountOrZero, Length, SmallCount, check_bounds
from oq2vl_jax.config import TrainConfig
from oq2vl_jax.config_files import load_config, with_changes
from oq2vl_jax.devices import NODE_DEVICES, Device, find_device
from oq2vl_jax.errors import UserError
from oq2vl_jax.runtime import WITHOUT_TRITON_PRODUCTS, set_environment


@dataclass(frozen=True)
class Plan:
    """Compile the train step for absent GPUs: memory, collectives, floor, and the options that fit."""

    config: Positional[str]
    """A file of configs/, or a resolved config.json."""
    changes: tuple[str, ...] = ()
    """Values to replace in it, such as optimizer.kind=muon ema.decay=0.999."""
    device: str = "a100-40g"
    """a100-40g, a100-80g, h100, h200, l40s, rtx-4090; cpu compiles for this machine: structure only."""
    num_devices: SmallCount = 8
    rows: tuple[SmallCount, ...] = (1, 2, 4)
    """Rows per microbatch to try."""
    remats: tuple[Literal["none", "dots", "attention", "full"], ...] = ("none", "dots", "attention", "full")
    """Recomputation to try, from most memory to most recomputation."""
    search: bool = True
    """Try which combinations fit; if off, compile only the configuration as it is."""
    scaling: tuple[SmallCount, ...] = ()
    """Show compute, communication and efficiency on these numbers of GPUs instead, such as 1 8 64."""
    text_tokens_per_image: Length | None = None
    """Text tokens of a typical document, for the FLOPs of a row; None: 27 (captions) or 260 (conversations)."""
    kernels: CountOrZero = 0
    """Show this many kernels of the compiled program, the longest by roofline first."""
    json: bool = False


OPTIONS = Plan


def measure(plan: Plan) -> dict[str, Any]:
    """Returns the plan as one JSON object; show() prints its parts."""
    check_bounds(plan, as_flags=True)
    device = None if plan.device == "cpu" else find_device(plan.device)
    config = with_changes(load_config(plan.config), plan.changes, "--changes")
    largest = max(plan.scaling or (plan.num_devices,))
    prepare_jax(device, largest)
    config = with_files_loaded(config)
    if plan.scaling:
        return {"scaling": [scaling_row(config, device, number, plan) for number in plan.scaling]}
    as_it_stands = examine(config, device, plan.num_devices, plan)
    result = {"config": plan.config, "device": plan.device, "num_devices": plan.num_devices, "plan": as_it_stands}
    if plan.search:
        tried = search(config, device, plan)
        fitting = [row for row in tried if row["fits"]]
        if device is None:  # without rates: the least recomputation, then the fewest bytes
            best = min(fitting, key=lambda row: (row["executed_tflop_per_row"], row["peak_gib"]), default=None)
        else:
            best = min(fitting, key=lambda row: row["roofline_ms_with_communication"], default=None)
        mesh = as_it_stands["mesh"]
        result |= {"tried": tried, "best": best, "command": command(plan, best, mesh) if best else None}
    return result


def with_files_loaded(config: TrainConfig) -> TrainConfig:
    """Reads the code of the user's own that the configuration names, before jax traces."""
    from oq2vl_jax.train.run import with_own_code

    return with_own_code(config, {})


def prepare_jax(device: Device | None, num_devices: int) -> None:
    """Sets the environment before jax is imported. The GPUs are absent, so jax itself runs on the CPU."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    simulated = (
        {"--xla_force_host_platform_device_count": str(num_devices)} if device is None else WITHOUT_TRITON_PRODUCTS
    )
    set_environment(simulated)


def search(config: TrainConfig, device: Device | None, plan: Plan) -> list[dict]:
    """Tries every combination, from few rows to many; once one does not fit, more rows are not tried."""
    tried = []
    for sharding in ("zero1", "fsdp") if plan.num_devices > 1 else (config.mesh.sharding,):
        for remat in plan.remats:
            for rows in plan.rows:
                if config.global_batch_size % (rows * plan.num_devices):
                    continue
                mesh = dataclasses.replace(config.mesh, sharding=sharding)
                candidate = dataclasses.replace(config, mesh=mesh, remat=remat, rows_per_device=rows)
                examined = examine(candidate, device, plan.num_devices, plan)
                keys = ("sharding", "rows_per_microbatch", "remat", "peak_gib", "fits", "executed_tflop_per_row",
                        "roofline_ms_with_communication", "roofline_tokens_per_second_per_gpu")  # fmt: skip
                tried.append({key: examined.get(key) for key in keys})
                if not plan.json:
                    print(f"  {sharding} {remat} {rows}: {examined['peak_gib']:.1f} GiB", file=sys.stderr, flush=True)
                if not examined["fits"]:
                    break
    return tried


def examine(config: TrainConfig, device: Device | None, num_devices: int, plan: Plan) -> dict[str, Any]:
    """Compiles one configuration; returns memory by kind, collectives, FLOPs and floor."""
    from oq2vl_jax.bench.compiled import compile_step, mesh_of
    from oq2vl_jax.bench.floor import floor
    from oq2vl_jax.bench.step import check
    from oq2vl_jax.train.attention_choice import choose_attention
    from oq2vl_jax.train.flops import typical_row
    from oq2vl_jax.train.gradients import rows_per_device

    check(config, num_devices)
    data, fsdp = mesh_shape(config, num_devices)
    mesh = mesh_of(device, num_devices, data, fsdp)
    compiled = compile_step(config, mesh)
    rows = rows_per_device(config, mesh)
    usable = device.usable_bytes if device else None
    return {
        "sharding": config.mesh.sharding,
        "mesh": {"data": data, "fsdp": fsdp},
        "rows_per_microbatch": rows,
        "remat": config.remat,
        "attention": choose_attention(config, mesh).name,
        "gib": {kind: round(size / 2**30, 3) for kind, size in compiled.memory._asdict().items()},
        "peak_gib": round(compiled.memory.peak / 2**30, 2),
        "usable_gib": round(usable / 2**30, 2) if usable else None,
        "fits": usable is None or compiled.memory.peak <= usable,
        "collectives": {
            kind: {"count": count, "gib": round(size / 2**30, 3)}
            for kind, (count, size) in compiled.collectives.items()
        },
        "compile_seconds": round(compiled.compile_seconds, 1),
        **floor(config, device, mesh, compiled, typical_row(config, plan.text_tokens_per_image), plan.kernels),
    }


def mesh_shape(config: TrainConfig, num_devices: int) -> tuple[int, int]:
    """Returns (data, fsdp) as configured if both are given and match num_devices. Otherwise fsdp is NODE_DEVICES, or
    num_devices if NODE_DEVICES does not divide it."""
    data, fsdp = config.mesh.data, config.mesh.fsdp
    if min(data, fsdp) > 0 and data * fsdp == num_devices:
        return data, fsdp
    fsdp = NODE_DEVICES if num_devices % NODE_DEVICES == 0 else num_devices
    return num_devices // fsdp, fsdp


def scaling_row(config: TrainConfig, device: Device | None, num_devices: int, plan: Plan) -> dict[str, Any]:
    """Returns compute and communication of one step with global_batch_size // NODE_DEVICES rows per GPU."""
    if device is None:
        raise UserError("--scaling needs a GPU of the table; a CPU has no stated rates.")
    rows_per_gpu = config.global_batch_size // NODE_DEVICES
    candidate = dataclasses.replace(config, global_batch_size=rows_per_gpu * num_devices)
    examined = examine(candidate, device, num_devices, plan)
    compute, communication = examined["roofline_ms_per_step"]["total"], examined["communication_ms_per_step"]
    return {
        "gpus": num_devices,
        "mesh": f"{examined['mesh']['data']} x {examined['mesh']['fsdp']}",
        "rows_per_step": candidate.global_batch_size,
        "peak_gib": examined["peak_gib"],
        "fits": examined["fits"],
        "compute_ms_by_roofline": compute,
        "communication_ms": communication,
        "efficiency_nothing_hidden": round(compute / (compute + communication), 4),
        "tokens_per_second": round(examined["roofline_tokens_per_second_per_gpu"] * num_devices),
    }


def command(plan: Plan, best: dict, mesh: dict) -> str:
    return (
        f"python -m oq2vl_jax.train {plan.config} --mesh.data {mesh['data']} --mesh.fsdp {mesh['fsdp']} "
        f"--mesh.sharding {best['sharding']} "
        f"--rows-per-device {best['rows_per_microbatch']} --remat {best['remat']}"
    )


def show(result: dict[str, Any]) -> None:
    """Prints the plan as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=140, highlight=False)

    def shown(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:,}" if isinstance(value, int | float) else str(value)

    def print_rows(title: str, rows: list[dict]) -> None:
        table = Table(*rows[0], title=title, title_justify="left", box=None)
        for row in rows:
            table.add_row(*map(shown, row.values()))
        console.print(table)

    if "scaling" in result:
        print_rows(
            "same rows per GPU; links and network as in oq2vl_jax/devices.py, nothing measured", result["scaling"]
        )
        return
    plan = result["plan"]
    console.print(f"{result['config']} on {result['num_devices']} x {result['device']}, mesh {plan['mesh']}")
    console.print(
        f"{plan['sharding']}, {plan['rows_per_microbatch']} rows per microbatch, remat {plan['remat']}, attention "
        f"{plan['attention']}; compiled in {plan['compile_seconds']} s\n"
    )
    print_rows("GiB per device", [{"kind": kind, "GiB": size} for kind, size in plan["gib"].items()])
    if plan["usable_gib"]:
        verdict = "fits" if plan["fits"] else "DOES NOT FIT"
        console.print(f"peak {plan['peak_gib']} of {plan['usable_gib']} GiB usable: {verdict}\n")
    if plan["collectives"]:
        print_rows("collectives of a step", [{"kind": k, **v} for k, v in plan["collectives"].items()])
    flops = {"part": "TFLOP per row"} | plan["model_tflop_per_row"]
    print_rows(f"\nmodel FLOPs ({plan['images_per_row']} images a row)", [flops])
    console.print(f"executed: {plan['executed_tflop_per_row']} TFLOP per row")
    if "floor_ms_per_step" in plan:
        console.print(
            f"floor: {plan['floor_ms_per_step']:,} ms per step, {plan['floor_tokens_per_second_per_gpu']:,} tokens/s a "
            f"GPU (MFU {plan['mfu_at_floor']}); communication {plan['communication_ms_per_step']:,} ms, nothing hidden"
        )
        least = plan["roofline_ms_per_step"]
        console.print(
            f"roofline of the compiled program: {least['total']:,} ms per step (products {least['matmul']:,}, "
            f"attention {least['attention']:,}, memory {least['memory']:,}), "
            f"{plan['roofline_tokens_per_second_per_gpu']:,} tokens/s a GPU (MFU {plan['mfu_at_roofline']})"
        )
        if plan["attention"] == "blocked":
            console.print("(too little: loops of blocked attention, as long as documents reach, count once)")
        if plan["kernels"]:
            print_rows("\nlongest kernels by roofline", plan["kernels"])
    if "tried" in result and not result["tried"]:
        console.print("\nno number of --rows divides the rows of a device")
    elif "tried" in result:
        print_rows("\nwhat fits", result["tried"])
        console.print(f"\n{result['command']}" if result["command"] else "\nnothing fits; try --rows 1 or more GPUs.")
