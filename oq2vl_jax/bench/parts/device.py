"""Part a: identifies the device and measures its peak rates with matrix products and a copy, on random data."""

import os
import platform
import shutil
import subprocess
from typing import Any

from oq2vl_jax.bench.parts.setting import GIB, Setting, median_seconds, prediction
from oq2vl_jax.devices import device_of_kind
from oq2vl_jax.train.environment import version

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "transformers", "tokenizers")
DRIVER_FIELDS = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory", "memory.total")
GPU_SIDE, CPU_SIDE = 8192, 1024
QUEUED_PRODUCTS = 10
GPU_COPY_BYTES, CPU_COPY_BYTES = 2 * GIB, GIB // 8


def probe() -> dict[str, Any]:
    """Returns the device's name in jax, its memory, the driver and versions; nothing is measured."""
    import jax

    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    return {
        "kind": device.device_kind,
        "platform": device.platform,
        "num_devices": len(jax.devices()),
        "memory_gib": memory["bytes_limit"] / GIB if "bytes_limit" in memory else None,
        "driver": driver(),
        "host": f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def driver() -> dict[str, str] | None:
    """Returns nvidia-smi's DRIVER_FIELDS of the first GPU, None if it does not report them."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(DRIVER_FIELDS)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(DRIVER_FIELDS, values, strict=True)) if len(values) == len(DRIVER_FIELDS) else None


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure(setting: Setting) -> dict[str, Any]:
    """Measures products in TFLOP/s and the copy in GB/s, counting bytes read and bytes written."""
    import jax

    probed = probe()
    side = GPU_SIDE if setting.is_gpu else CPU_SIDE
    rates = {
        "bfloat16": product_rate(side, "bfloat16", None),
        "float32": product_rate(side, "float32", None),
        "float32, highest precision": product_rate(side, "float32", "highest"),
    }
    copied = copy_rate(GPU_COPY_BYTES if setting.is_gpu else CPU_COPY_BYTES)
    device = device_of_kind(jax.devices()[0].device_kind)
    predictions = []
    if device is not None:
        predictions = [
            prediction(f"bf16 product {side}^3", "TFLOP/s", device.peak_flops / 1e12, rates["bfloat16"] / 1e12, True),
            prediction("copy on the device", "GB/s", device.memory_rate / 1e9, copied / 1e9, True),
        ]
    peak = rates["bfloat16"] if setting.is_gpu else rates["float32"]
    return probed | {
        "product_side": side,
        "product_tflops": {name: rate / 1e12 for name, rate in rates.items()},
        "copy_gb_per_second": copied / 1e9,
        "peak_flops": peak,
        "memory_rate": copied,
        "is_in_the_table": device is not None,
        "predictions": predictions,
    }


def product_rate(side: int, dtype: str, precision: str | None) -> float:
    """Returns the FLOP/s of a square matrix product of normally distributed numbers.

    Several products are queued before the host waits: waiting after each costs 0.3 ms, a fifth of a product of an H200.
    """
    import jax

    a, b = (jax.random.normal(key, (side, side), dtype) for key in jax.random.split(jax.random.key(0)))
    multiply = jax.jit(lambda a, b: jax.numpy.matmul(a, b, precision=precision))

    def products() -> None:
        for _ in range(QUEUED_PRODUCTS):
            product = multiply(a, b)
        jax.block_until_ready(product)

    return QUEUED_PRODUCTS * 2 * side**3 / median_seconds(products)


def copy_rate(num_bytes: int) -> float:
    """Returns bytes read and written per second by repeated x + 1 in the same buffers. A bare copy may be optimised
    away, and a CPU maps fresh memory page by page."""
    import jax

    x, times = jax.random.normal(jax.random.key(0), (num_bytes // 4,)), 10
    add = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, x: x + 1, x))
    return 2 * times * num_bytes / median_seconds(lambda: add(x).block_until_ready(), 3)
