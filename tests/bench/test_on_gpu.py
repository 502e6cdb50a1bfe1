"""On a GPU: the kernel passes its own check there, and every attention computes the same step. `pytest -m gpu`."""

import json
import os
import subprocess
import sys

import pytest

ATTENTIONS = ("xla", "blocked", "kernel")
LOSS_TOLERANCE = 1e-4  # relative, matrix products in TF32; an H200: 2.5e-6
TIMES_ROUNDING = 2.0  # of the reference in the same type; an H200: 1.77
TIMES_GRADIENT_ERROR = 2.0  # of the plain step's in the same type; an H200 before sums were float32: 9.2
AS_JAX_FINDS_IT = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}


pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def gpu():
    """Skips where jax, asked in a process of its own, finds no GPU."""
    program = "import jax; print(jax.devices()[0].platform)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=AS_JAX_FINDS_IT)
    if done.stdout.strip() not in ("gpu", "cuda"):
        pytest.skip(f"jax finds no GPU here ({done.stdout.strip() or done.stderr.strip().splitlines()[-1]})")


def bench_step(attention: str, config: str = "configs/bench_mid.py") -> tuple[dict, str]:
    """(result, what it said) of a measured step in a process of its own, on the platform jax finds."""
    command = [sys.executable, "-m", "oq2vl_jax.bench", "step", config, "--attention", attention,
               "--num-steps", "2", "--warmup-steps", "1", "--no-breakdown", "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=AS_JAX_FINDS_IT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_every_attention_computes_the_same_step():
    results = {attention: bench_step(attention) for attention in ATTENTIONS}
    for attention, (result, said) in results.items():
        assert result["attention"] == attention, said
        print(f"{attention}: {result['step_seconds']:.4f} s a step, first loss {result['first_loss']:.6f}")
        assert result["first_loss"] == pytest.approx(results["xla"][0]["first_loss"], rel=LOSS_TOLERANCE)


def test_the_kernel_is_chosen_and_passes_its_check_at_the_published_heads():
    """`auto` falls back with a warning where the check fails."""
    program = (
        "from oq2vl_jax.config_files import load_config;"
        "from oq2vl_jax.train.attention_choice import checked_compute;"
        "from oq2vl_jax.sharding import make_mesh;"
        "config = load_config('configs/pretrain.py');"
        "print(checked_compute(config, make_mesh(config.mesh)).attention)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=AS_JAX_FINDS_IT)
    assert done.stdout.strip() == "kernel", done.stderr


def test_attentions_and_the_step_are_as_exact_as_the_reference_rounds(tmp_path):
    """Part b of a report: kernel, blocked and cuDNN at the published shapes, and the gradients of the fast step."""
    command = [sys.executable, "-m", "oq2vl_jax.bench", "report", "--out", str(tmp_path), "--only", "b", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=AS_JAX_FINDS_IT)
    assert done.returncode == 0, done.stderr
    items = json.loads(done.stdout)["items"]
    rows = items["exactness"]["figures"]["attention"]
    for row in rows:
        print(row)
    assert {row["attention"] for row in rows} == {"xla", "blocked", "kernel"}
    assert all(row["times the reference's rounding"] <= TIMES_ROUNDING for row in rows if row["type"] == "bfloat16")
    for row in items["exactness_step"]["figures"]["step"]:
        print(row)
        assert row["largest error of a gradient"] <= TIMES_GRADIENT_ERROR * row["own error of a gradient"]
