"""The least time of a compiled program: what runs how often, what it multiplies, what it reads and writes."""

import json
import os
import subprocess
import sys

import pytest

from oq2vl_jax.bench.roofline import roofline
from oq2vl_jax.devices import DEVICES

PROGRAM = """
%sliced (stack: f32[10,1000], i: s32[]) -> f32[1,1000] {
  %stack = f32[10,1000]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %cut = f32[1,1000]{1,0} dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,1000}
}

%updated (stack: f32[10,1000], part: f32[1,1000], i: s32[]) -> f32[10,1000] {
  %stack = f32[10,1000]{1,0} parameter(0)
  %part = f32[1,1000]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %put = f32[10,1000]{1,0} dynamic-update-slice(%stack, %part, %i, %zero)
}

%body.1 (arg: (s32[])) -> (s32[]) {
  %x = bf16[4096,8192]{1,0} parameter(0)
  %y = bf16[8192,2048]{1,0} parameter(1)
  %stack = f32[10,1000]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %product.1 = (f32[4096,2048]{1,0}, s8[4194304]{0}) custom-call(%x, %y), custom_call_target="__cublas$lt$matmul", \
backend_config={"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}
  %row.1 = f32[1,1000]{1,0} fusion(%stack, %i), kind=kLoop, calls=%sliced
  %begun.1 = ((f32[10,1000]{1,0}, s32[]), f32[1,1000]{1,0}, u32[]) fusion-start(%stack, %i), kind=kLoop, calls=%sliced
  %ended.1 = f32[1,1000]{1,0} fusion-done(%begun.1)
  %kept.1 = f32[10,1000]{1,0} fusion(%stack, %row.1, %i), kind=kLoop, calls=%updated
}

%gemm_fusion (a: bf16[300,100], b: bf16[100,200]) -> bf16[300,200] {
  %a = bf16[300,100]{1,0} parameter(0)
  %b = bf16[100,200]{1,0} parameter(1)
  ROOT %dot.9 = bf16[300,200]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%never.known (arg: (s32[])) -> (s32[]) {
  %z = f32[500]{0} parameter(0)
  %again = f32[500]{0} copy(%z)
}

%taken (arg: (s32[])) -> (s32[]) {
  %z = f32[700]{0} parameter(0)
  %other = f32[700]{0} negate(%z)
}

%skipped (arg: (s32[])) -> (s32[]) {
  %zeros = f32[700]{0} broadcast(%z)
}

ENTRY %main (p: f32[]) -> f32[] {
  %w.1 = (s32[]) while(%t), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"7"}}
  %w.2 = (s32[]) while(%t), condition=%c, body=%never.known, metadata={op_name="jit(step)/loss/while"}
  %w.3 = (s32[]) while(%t), condition=%c, body=%never.known, metadata={op_name="jit(step)/attention/while"}
  %a.1 = bf16[300,100]{1,0} parameter(1)
  %b.1 = bf16[100,200]{1,0} parameter(2)
  %triton.1 = bf16[300,200]{1,0} fusion(%a.1, %b.1), kind=kCustom, calls=%gemm_fusion
  %plain.1 = bf16[300,200]{1,0} dot(%a.1, %b.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %c.1 = (s32[]) conditional(%p, %t, %t), true_computation=%taken, false_computation=%skipped
}
"""
A100 = DEVICES["a100-40g"]


def test_kernels_take_their_flops_or_their_bytes():
    kernels = {
        kernel.name: kernel for kernel in roofline(PROGRAM, A100, unknown_trips={"loss": 5}, longest_branch=0.75)
    }
    assert {name: kernel.times for name, kernel in kernels.items()} == {
        "product": 7, "row": 7, "begun": 7, "kept": 7, "again": 5 + 1, "other": 0.75, "zeros": 0.25,
        "triton": 1, "plain": 1,
    }  # fmt: skip
    for name in ("triton", "plain"):
        assert kernels[name].kind == "matmul"
        assert kernels[name].flops == 2 * 300 * 100 * 200
        assert kernels[name].num_bytes == 2 * (300 * 100 + 100 * 200 + 300 * 200)
        assert kernels[name].instructions == (f"{name}.1",)
    flops = 2 * 4096 * 8192 * 2048
    assert kernels["product"].flops == flops
    assert kernels["product"].num_bytes == 2 * (4096 * 8192 + 8192 * 2048) + 4 * 4096 * 2048, "scratch does not count"
    assert kernels["product"].seconds == pytest.approx(7 * flops / A100.peak_flops)
    assert kernels["row"].num_bytes == 2 * 4 * 1000 + 4, "of a stack the part that is cut out, and the index"
    assert kernels["begun"].num_bytes == kernels["row"].num_bytes
    assert kernels["kept"].num_bytes == 2 * 4 * 1000 + 4, "updated in place"
    assert kernels["again"].seconds == pytest.approx(6 * 2 * 4 * 500 / A100.memory_rate)


@pytest.mark.plan
def test_the_compiled_step_multiplies_what_the_formula_says():
    """Two independent counts: the products of the program XLA made, and train/flops.py."""
    command = ["-m", "oq2vl_jax.bench", "plan", "configs/pretrain.py", "--no-search", "--kernels", "1000", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    plan = json.loads(done.stdout)["plan"]
    counted = sum(kernel["runs"] * kernel["gflop"] for kernel in plan["kernels"]) / 1e3
    expected = 32 * plan["executed_tflop_per_row"]
    print(f"counted {counted:.1f} TFLOP, by the formula {expected:.1f}: {counted / expected:.4f}")
    # the formula pads the encoder's last chunk by half of it, 2 %; the typical row happens to fill it
    assert counted == pytest.approx(expected, rel=0.03)
    assert 1 < plan["roofline_ms_per_step"]["total"] / plan["floor_ms_per_step"] < 1.3  # measured 1.23
