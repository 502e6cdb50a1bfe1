"""The benchmarks, one a module that binds BENCHMARK under its own name; a new module is a task of oq2vl_jax.eval."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the names of tasks are needed by --help, which is instant
    from oq2vl_jax.eval.benchmark import Benchmark

TASKS = tuple(sorted(file.stem for file in Path(__file__).parent.glob("*.py") if file.stem != "__init__"))


def find_benchmark(name: str) -> Benchmark:
    """Returns the benchmark of one of TASKS."""
    benchmark = importlib.import_module(f"{__name__}.{name}").BENCHMARK
    assert benchmark.name == name, f"{name}.py binds the benchmark {benchmark.name}"
    return benchmark
