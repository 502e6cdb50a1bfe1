"""Estimates the time of a program compiled for a GPU by the roofline of each kernel: its FLOPs and its bytes.

A kernel takes at least its FLOPs at the device's peak, and at least its bytes at the rate of its memory; the larger of
the two counts (the roofline model, doi 10.1145/1498765.1498785). Cache hits and launch latency are left out. Pallas
kernels count by their bytes only, because the text does not state their FLOPs. The result is not a prediction. It
serves to compare two programs and to find the kernels that take the time outside matrix products.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

from oq2vl_jax.bench.program import (
    COLLECTIVES,
    Execution,
    Instruction,
    array_bytes,
    called,
    computations,
    dims_of,
    executions,
)
from oq2vl_jax.devices import Device, Rates

FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "while", "conditional", "call",
        "async-start", "copy-start", "partition-id", "replica-id"}  # fmt: skip
"""Opcodes that take no time of their own, as do all that end in -done."""
SLICES, UPDATES = {"dynamic-slice", "slice", "gather"}, {"dynamic-update-slice", "scatter"}


class Kernel(NamedTuple):
    """Equal kernels of a program. seconds, times: of all runs. kind: matmul, attention or memory. flops, num_bytes: of
    one run. name: without XLA's number. shape: of the output. instructions: names in the program and in a profile."""

    seconds: float
    kind: str
    times: float
    flops: float
    num_bytes: int
    name: str
    shape: str
    instructions: tuple[str, ...]


def roofline(
    text: str,
    device: Device | Rates,
    unknown_trips: dict[str, float] | None = None,
    longest_branch: float | None = None,
) -> list[Kernel]:
    """Returns the kernels of one run, the longest first; kernels equal in name, shape, FLOPs and bytes are added up.

    unknown_trips, longest_branch: see program.executions.
    """
    bodies = computations(text)
    alike: dict[tuple, list[float]] = defaultdict(lambda: [0.0, 0.0])
    instructions: dict[tuple, dict[str, None]] = defaultdict(dict)
    for execution in executions(bodies, unknown_trips, longest_branch):
        instruction = execution.instruction
        if instruction.op in FREE or instruction.op.endswith("-done") or instruction.op.startswith(COLLECTIVES):
            continue
        kind, flops = kind_and_flops(execution, bodies)
        num_bytes = bytes_moved(execution, bodies)
        seconds = max(flops / device.peak_flops, num_bytes / device.memory_rate)
        name = re.sub(r"(\.\d+|\.clone)+$", "", instruction.name)
        key = (kind, flops, num_bytes, name, instruction.shape)
        alike[key][0] += execution.times * seconds
        alike[key][1] += execution.times
        instructions[key][instruction.name] = None
    kernels = [
        Kernel(seconds, kind, times, flops, num_bytes, name, shape, tuple(instructions[key]))
        for key, (seconds, times) in alike.items()
        for kind, flops, num_bytes, name, shape in [key]
    ]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


def kind_and_flops(execution: Execution, bodies: dict[str, list[Instruction]]) -> tuple[str, float]:
    """Returns the kind of a kernel and its FLOPs: those of matrix products and of cuDNN's attention, otherwise 0.

    A fusion that holds a matrix product (Triton's on a GPU, any on a CPU) counts as matmul.
    """
    instruction, shapes = execution.instruction, operand_shapes(execution)
    products = product_flops(instruction, execution.scope, bodies)
    if products:
        return "matmul", products
    target = re.search(r'custom_call_target="([^"]+)"', instruction.line)
    if target is None:
        return "memory", 0.0
    if "cublas" in target[1]:
        axes = re.findall(r'lhs_contracting_dimensions":\["(\d+)"\]', instruction.line)
        assert len(axes) == 1, instruction.line
        return "matmul", 2.0 * math.prod(dims_of(instruction.shape)) * dims_of(shapes[0])[int(axes[0])]
    if "fmha" in target[1]:  # [B, T, N, H] queries, [B, S, K, H] keys; two products, five in the backward pass
        products = 5 if "Backward" in target[1] else 2
        return "attention", 2.0 * products * math.prod(dims_of(shapes[0])) * dims_of(shapes[1])[1]
    return ("attention" if "triton" in target[1] else "memory"), 0.0


def product_flops(instruction: Instruction, scope: dict[str, Instruction], bodies: dict) -> float:
    """Returns the FLOPs of a dot, or of the dots within a fusion."""
    if instruction.op == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.line)
        left = dims_of(scope[instruction.operands[0]].shape)
        contracted = math.prod(left[int(axis)] for axis in axes[1].split(",") if axis) if axes else 1
        return 2.0 * math.prod(dims_of(instruction.shape)) * contracted
    if instruction.op not in ("fusion", "fusion-start"):
        return 0.0
    inner = {one.name: one for one in bodies.get(called(instruction.line, "calls"), ())}
    return sum(product_flops(one, inner, bodies) for one in inner.values())


def bytes_moved(execution: Execution, bodies: dict[str, list[Instruction]]) -> int:
    """Returns the bytes that a kernel reads and writes; an array that a fusion slices or updates in place counts by the
    accessed part only."""
    instruction, shapes = execution.instruction, operand_shapes(execution)
    if instruction.op in ("fusion", "fusion-start"):
        return fusion_bytes(bodies[called(instruction.line, "calls")])
    written = array_bytes(instruction.shape)
    if "cublas" in instruction.line:
        written = written[:1]  # the second one is scratch
    return sum(written) + sum(sum(array_bytes(shape)) for shape in shapes)


def fusion_bytes(body: list[Instruction]) -> int:
    by_name = {instruction.name: instruction for instruction in body}
    uses = defaultdict(list)
    for instruction in body:
        for position, operand in enumerate(instruction.operands):
            uses[operand].append((instruction, position))

    def final_uses(name: str):
        for user, position in uses[name]:
            if user.op in ("bitcast", "reshape"):
                yield from final_uses(user.name)
            else:
                yield user, position

    def read(parameter: Instruction) -> int:
        users, whole = list(final_uses(parameter.name)), sum(array_bytes(parameter.shape))
        if users and all(user.op in UPDATES and position == 0 for user, position in users):
            return 0
        if users and all(user.op in SLICES and position == 0 for user, position in users):
            return min(whole, sum(sum(array_bytes(user.shape)) for user, _ in users))
        return whole

    def written(instruction: Instruction) -> int:
        if instruction.op in ("bitcast", "reshape", "tuple"):
            return sum(written(by_name[operand]) for operand in instruction.operands)
        if instruction.op == "dynamic-update-slice":
            return sum(array_bytes(by_name[instruction.operands[1]].shape))
        if instruction.op == "scatter":  # also reads the values that it adds to
            return 2 * sum(array_bytes(by_name[instruction.operands[-1]].shape))
        return sum(array_bytes(instruction.shape))

    root = next(instruction for instruction in body if instruction.is_root)
    return sum(read(instruction) for instruction in body if instruction.op == "parameter") + written(root)


def operand_shapes(execution: Execution) -> list[str]:
    return [execution.scope[name].shape for name in execution.instruction.operands if name in execution.scope]
