"""Part d: times two PyTorch forms on the same rows and weights, in turns (tests/peers/compare.py of a checkout)."""

import importlib.util
import json
import subprocess
import sys
from typing import Any

from oq2vl_jax.bench.parts.setting import Setting, Skipped, saved_config
from oq2vl_jax.bench.parts.steps import settled_config, with_rows

ROWS = 4


def measure(setting: Setting) -> dict[str, Any]:
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise Skipped(f"it needs the package {package}")
    if importlib.util.find_spec("tests") is None or importlib.util.find_spec("tests.peers") is None:
        raise Skipped("it needs a checkout of the repository as the working folder: the peers stand in tests/peers")
    config = settled_config(setting)
    rows = min(ROWS, config.global_batch_size)
    while (config.rows_per_device or 1) > rows:
        config = with_rows(config, 0.5)
    command = [sys.executable, "-m", "tests.peers.compare", saved_config(setting, config), "--json",
               "--global-rows", str(rows), "--rounds", "1", "--steps", "3" if setting.is_gpu else "1"]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if not done.stdout.strip():
        raise RuntimeError("the comparison ended without a result; its own words stand above")
    return json.loads(done.stdout.strip().splitlines()[-1])
