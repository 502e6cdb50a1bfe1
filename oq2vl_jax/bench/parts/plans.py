"""Part h: runs `bench plan` for one GPU of each of four kinds, to compare with the measured step.

It needs jax's CUDA plugin as a compiler (the extra plan), but no GPU.
"""

import json
import os
import subprocess
import sys
from typing import Any

from oq2vl_jax.bench.parts.setting import Setting, Skipped

DEVICES = ("h200", "h100", "a100-40g", "a100-80g")
ROWS, REMATS = ("1", "2", "4"), ("none", "dots")


def measure(setting: Setting, device: str) -> dict[str, Any]:
    config = setting.config if setting.is_gpu or not setting.is_default else "configs/pretrain.py"
    command = [sys.executable, "-m", "oq2vl_jax.bench", "plan", config, "--device", device, "--num-devices", "1",
               "--rows", *ROWS, "--remats", *REMATS, "--json"]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"JAX_PLATFORMS": "cpu"})
    if done.returncode == 2 and "jax cannot compile for" in done.stderr:
        raise Skipped("jax cannot compile for GPUs here; it needs the extra plan")
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    plan = json.loads(done.stdout)
    return {"device": device, "usable_gib": plan["plan"]["usable_gib"], "tried": plan["tried"], "best": plan["best"]}
