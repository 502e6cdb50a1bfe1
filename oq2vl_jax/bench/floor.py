"""Estimates the time of a compiled step on a GPU from its FLOPs, the roofline of its kernels and its communication."""

import math
from typing import Any

from jax.sharding import Mesh

from oq2vl_jax.bench.compiled import Compiled
from oq2vl_jax.bench.roofline import Kernel, roofline
from oq2vl_jax.config import TrainConfig
from oq2vl_jax.devices import NODE_DEVICES, Device, Rates
from oq2vl_jax.model.open_qwen2vl import IMAGES_PER_CHUNK
from oq2vl_jax.train.flops import Work, executed_flops, model_flops
from oq2vl_jax.train.gradients import chunk_size, rows_per_device


def floor(
    config: TrainConfig, device: Device | None, mesh: Mesh, compiled: Compiled, row: Work, num_kernels: int = 0
) -> dict[str, Any]:
    """Returns the FLOPs of a row by the model's formula, and times at the rates of the device and its links.

    row: contents of a row. num_kernels: number of the longest kernels to list. Without a device there are no times.
    """
    rows_per_step, rows = config.global_batch_size / mesh.size, rows_per_device(config, mesh)
    needed, executed = model_flops(config, row), executed_flops(config, row, rows, 1)
    result = {
        "images_per_row": round(row.images, 2),
        "model_tflop_per_row": {**{k: round(v / 1e12, 2) for k, v in needed._asdict().items()},
                                "total": round(needed.total / 1e12, 2)},
        "executed_tflop_per_row": round(executed.total / 1e12, 2),
    }  # fmt: skip
    if device is None:
        return result | {"roofline_ms_with_communication": None}
    compute = rows_per_step * executed.total / device.peak_flops
    communication = communication_seconds(compiled.collectives, device, mesh.size)
    kernels = kernels_of(config, row, rows, compiled, device)
    least = sum(kernel.seconds for kernel in kernels)
    by_kind = {
        kind: round(1e3 * sum(kernel.seconds for kernel in kernels if kernel.kind == kind))
        for kind in ("matmul", "attention", "memory")
    }
    return result | {
        "floor_ms_per_step": round(1e3 * compute, 1),
        "floor_tokens_per_second_per_gpu": round(rows_per_step * row.tokens / compute),
        "mfu_at_floor": round(needed.total / executed.total, 3),
        "roofline_ms_per_step": {**by_kind, "total": round(1e3 * least, 1)},
        "roofline_tokens_per_second_per_gpu": round(rows_per_step * row.tokens / least),
        "mfu_at_roofline": round(rows_per_step * needed.total / device.peak_flops / least, 3),
        "communication_ms_per_step": round(1e3 * communication, 1),
        "roofline_ms_with_communication": round(1e3 * (least + communication), 1),
        "kernels": [shown(kernel) for kernel in kernels[:num_kernels]],
    }


def shown(kernel: Kernel) -> dict[str, Any]:
    return {
        "ms": round(1e3 * kernel.seconds, 1),
        "kind": kernel.kind,
        "runs": round(kernel.times),
        "gflop": round(kernel.flops / 1e9, 1),
        "mb": round(kernel.num_bytes / 1e6, 1),
        "kernel": f"{kernel.name} {kernel.shape[:60]}",
    }


def kernels_of(config: TrainConfig, row: Work, rows: int, compiled: Compiled, device: Device | Rates) -> list[Kernel]:
    """Returns the kernels of a step on rows like `row`. Its labels set the number of loss chunks, its images the
    share of encoder chunks that run.

    Loops of blocked attention count once, because their length depends on the documents; their time is too low.
    """
    loss_chunks = math.ceil(rows * row.labelled / chunk_size(rows * config.data.num_tokens))
    slots = max(1, math.ceil(rows * config.data.max_images / IMAGES_PER_CHUNK))
    filled = min(slots, math.ceil(rows * row.images / IMAGES_PER_CHUNK))
    return roofline(compiled.text, device, {"loss": loss_chunks}, filled / slots)


def communication_seconds(collectives: dict[str, tuple[int, int]], device: Device, num_devices: int) -> float:
    """Returns the seconds of ring collectives over the links, with none hidden behind computation.

    All-gathers and reduce-scatters stay within a node; an all-reduce over nodes moves this GPU's shard over the
    network. All-to-alls and collective-permutes are left out.
    """
    node = min(num_devices, NODE_DEVICES)
    if num_devices == 1:
        return 0.0
    share = (node - 1) / node
    gathered = sum(collectives.get(kind, (0, 0))[1] for kind in ("all-gather", "reduce-scatter"))
    reduced = collectives.get("all-reduce", (0, 0))[1]
    across = num_devices > NODE_DEVICES
    rate = device.network_rate if across else device.link_rate
    return share * gathered / device.link_rate + 2 * (share if not across else 1) * reduced / rate
