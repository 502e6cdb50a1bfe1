"""Compiles the train step for devices that need not be present, and reads its memory and collectives.

jax's CUDA plugin compiles for a GPU from a description (oq2vl_jax/devices.py), on a machine without one. Memory comes
from XLA's buffer assignment, collectives from the text of the compiled program; a loop's body counts once per
iteration. Nothing runs, so there are no times, and cuDNN calls are not validated.
"""

import math
import re
import time
from collections import defaultdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from oq2vl_jax.bench.program import COLLECTIVES, Instruction, array_bytes, computations, executions
from oq2vl_jax.config import TrainConfig
from oq2vl_jax.data.loading.batch import Batch
from oq2vl_jax.devices import NODE_DEVICES, Device
from oq2vl_jax.errors import UserError
from oq2vl_jax.sharding import bytes_per_device, parameter_shardings, row_sharding
from oq2vl_jax.train.gradients import compute_copy
from oq2vl_jax.train.parts import split_trainable
from oq2vl_jax.train.step import compile_train_step, init_train_state, state_shardings


class Memory(NamedTuple):
    """Bytes on one device. activations: the peak minus all other fields."""

    parameters: int
    optimizer: int
    averaged_weights: int
    batch: int
    gathered_weights: int
    gradients: int
    activations: int
    peak: int


class Compiled(NamedTuple):
    """A compiled step. collectives: kind -> (number in a step, bytes of the unsharded arrays)."""

    memory: Memory
    collectives: dict[str, tuple[int, int]]
    compile_seconds: float
    text: str
    executable: jax.stages.Compiled
    """(TrainState, Batch) -> (TrainState, StepMetrics); it runs only if the devices are present."""


def mesh_of(device: Device | None, num_devices: int, data: int, fsdp: int) -> Mesh:
    """Returns a (data, fsdp) mesh of absent GPUs, or of this machine's CPU devices if device is None.

    Raises UserError if jax cannot compile for GPUs here, or has fewer CPU devices than num_devices.
    """
    if device is None:
        devices = jax.devices("cpu")
        if len(devices) < num_devices:
            raise UserError(f"{num_devices} CPU devices are asked for, XLA was started with {len(devices)}.")
        devices = devices[:num_devices]
    else:
        from jax.experimental import topologies

        nodes = max(1, num_devices // NODE_DEVICES)
        try:
            description = topologies.get_topology_desc(
                platform="cuda", target_config=device.target_config(), topology=f"1x{nodes}x{num_devices // nodes}"
            )
        except Exception as error:  # raised by the plugin or because it is absent
            raise UserError(
                f"jax cannot compile for {device.name} here ({str(error).splitlines()[0]}); install the extra plan: "
                "pip install 'oq2vl-jax[plan]', or look at the structure alone with --device cpu."
            ) from error
        devices = description.devices
    return Mesh(np.array(devices).reshape(data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def compile_step(config: TrainConfig, mesh: Mesh) -> Compiled:
    """Compiles the whole optimizer step of a configuration, without allocating its arrays.

    Raises UserError if jax cannot compile its Pallas kernels for an absent GPU (jax 0.11: the L40S).
    """
    shardings = state_shardings(config, mesh)
    state = jax.eval_shape(lambda: init_train_state(jax.random.key(0), config))
    batch = batch_shapes(config, mesh)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    start = time.perf_counter()
    try:
        compiled = compile_train_step(config, mesh).lower(placed, batch).compile()
    except RuntimeError as error:
        if "No supported GPU devices found" not in str(error):
            raise
        kind = next(iter(mesh.devices.flat)).device_kind
        raise UserError(
            f"jax {jax.__version__} cannot compile the attention kernel for {kind} unless one is there; jax 0.10.2 "
            "can, or set attention = blocked in the configuration."
        ) from error
    seconds = time.perf_counter() - start
    analysis, text = compiled.memory_analysis(), compiled.as_text()
    assert analysis is not None
    assert text is not None
    peak = getattr(analysis, "peak_memory_in_bytes", 0) or (
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )
    gathered, gradients = named_temporaries(config, mesh)
    rows = row_sharding(mesh)
    named = {
        "parameters": bytes_per_device(state.model, shardings.model),
        "optimizer": bytes_per_device(state.opt_state, shardings.opt_state),
        "averaged_weights": bytes_per_device(state.ema, shardings.ema),
        "batch": sum(math.prod(rows.shard_shape(x.shape)) * x.dtype.itemsize for x in batch),
        "gathered_weights": gathered,
        "gradients": gradients,
    }
    memory = Memory(**named, activations=peak - sum(named.values()), peak=peak)
    return Compiled(memory, count_collectives(text), seconds, text, compiled)


def batch_shapes(config: TrainConfig, mesh: Mesh) -> Batch:
    """Returns the shapes of a global batch with its rows sharded over all devices."""
    rows, size = row_sharding(mesh), config.model.vision.image_size
    numbers = jax.ShapeDtypeStruct((config.global_batch_size, config.data.num_tokens), jnp.int32, sharding=rows)
    shape = (config.global_batch_size, config.data.max_images, size, size, 3)
    return Batch(numbers, numbers, numbers, numbers, jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=rows))


def named_temporaries(config: TrainConfig, mesh: Mesh) -> tuple[int, int]:
    """Returns (bytes of gathered weights, bytes of float32 gradients) on a device during a step.

    zero1 holds all weights and all gradients whole. FSDP holds whole the frozen weights, the weights outside the
    decoder's layers, and one layer at a time. Its gradients are whole outside the layers and sharded within them.
    """
    model = jax.eval_shape(lambda: compute_copy(init_train_state(jax.random.key(0), config).model, config))
    trained, _ = split_trainable(model, config)
    if config.lora.rank is not None and mesh.shape["fsdp"] == 1:  # the base is used as it is stored
        return 0, 4 * sum(x.size for x in jax.tree.leaves(trained))
    if config.mesh.sharding == "zero1":
        return total_bytes(model), 4 * sum(x.size for x in jax.tree.leaves(trained))
    layers = total_bytes(trained.decoder.layers)
    held = total_bytes(model) - layers + layers // config.model.decoder.num_layers
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trained)
    shares = bytes_per_device(wide.decoder.layers, parameter_shardings(trained, mesh).decoder.layers)
    return held, total_bytes(wide) - total_bytes(wide.decoder.layers) + shares


def total_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def count_collectives(text: str) -> dict[str, tuple[int, int]]:
    """Returns {kind: (count, bytes of the unsharded arrays)} of one run of a compiled program.

    A loop without a known trip count counts once; every branch of a conditional counts as taken.
    """
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for instruction, times, _ in executions(computations(text)):
        kind = instruction.op.removesuffix("-start")
        if kind in COLLECTIVES:
            totals[kind][0] += int(times)
            totals[kind][1] += int(times) * whole_bytes(instruction)
    return {kind: (count, size) for kind, (count, size) in totals.items()}


def group_size(line: str) -> int:
    """Returns the number of devices in a group of a collective, 1 if the line names no groups. replica_groups has three
    forms: {{0,1,2,3}}, [groups,devices]<=[...], and from jax 0.11 on mesh['data'=1,'fsdp'=8] {'fsdp'}."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed[1].split(","))
    by_axes = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if by_axes:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", by_axes[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", by_axes[2]))
    short = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    return int(short[1]) if short else 1


def whole_bytes(collective: Instruction) -> int:
    """Returns the bytes of the unsharded arrays of a collective: the larger of its operands and its results.
    all-gather-start and reduce-scatter-start name both in their shape; others name the results only."""
    sizes, op = array_bytes(collective.shape), collective.op
    if op in ("all-gather-start", "reduce-scatter-start"):
        half = len(sizes) // 2
        return max(sum(sizes[:half]), sum(sizes[half:]))
    return sum(sizes) * (group_size(collective.line) if op == "reduce-scatter" else 1)
