"""The train step compiled for devices that need not be there, and what the compiler says about it.

jax's CUDA plugin compiles for a GPU it is only told about (its facts: oq2vl_jax/devices.py), on a machine without one.
Buffers come from XLA's own assignment, collectives from the text of the compiled program, where a loop's body counts as
often as the loop runs. Nothing is run, so there are no times here; cuDNN calls are not validated by such a compilation.
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
    """Bytes of one device. activations: what the peak has beyond everything that is known by name."""

    parameters: int
    optimizer: int
    batch: int
    gathered_weights: int
    gradients: int
    activations: int
    peak: int


class Compiled(NamedTuple):
    """collectives: kind -> (how many run in a step, bytes of the whole arrays they bring together)."""

    memory: Memory
    collectives: dict[str, tuple[int, int]]
    compile_seconds: float
    text: str
    executable: jax.stages.Compiled
    """(TrainState, Batch) -> (TrainState, StepMetrics), where the devices are there."""


def mesh_of(device: Device | None, num_devices: int, data: int, fsdp: int) -> Mesh:
    """A (data, fsdp) mesh of absent GPUs; of this machine's CPU devices for None.

    Raises UserError where jax cannot compile for GPUs here.
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
        except Exception as error:  # of the plugin or of its absence
            raise UserError(
                f"jax cannot compile for {device.name} here ({str(error).splitlines()[0]}); install the extra plan: "
                "pip install 'oq2vl-jax[plan]', or look at the structure alone with --device cpu."
            ) from error
        devices = description.devices
    return Mesh(np.array(devices).reshape(data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def compile_step(config: TrainConfig, mesh: Mesh) -> Compiled:
    """Compiles the whole optimizer step of a configuration; nothing is allocated.

    Raises UserError where jax does not know an absent GPU well enough for its Pallas kernels (0.11: the L40S).
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
        "batch": sum(math.prod(rows.shard_shape(x.shape)) * x.dtype.itemsize for x in batch),
        "gathered_weights": gathered,
        "gradients": gradients,
    }
    memory = Memory(**named, activations=peak - sum(named.values()), peak=peak)
    return Compiled(memory, count_collectives(text), seconds, text, compiled)


def batch_shapes(config: TrainConfig, mesh: Mesh) -> Batch:
    """The shapes of a global batch, rows over all devices."""
    rows, size = row_sharding(mesh), config.model.vision.image_size
    numbers = jax.ShapeDtypeStruct((config.global_batch_size, config.data.num_tokens), jnp.int32, sharding=rows)
    shape = (config.global_batch_size, config.data.max_images, size, size, 3)
    return Batch(numbers, numbers, numbers, numbers, jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=rows))


def named_temporaries(config: TrainConfig, mesh: Mesh) -> tuple[int, int]:
    """(bytes of the weights a device holds whole, bytes of its float32 gradients) during a step.

    FSDP holds whole what is frozen and what lies outside the decoder's layers, and one layer at a time; so it does with
    gradients, but that those of the layers are shares from the start.
    """
    model = jax.eval_shape(lambda: compute_copy(init_train_state(jax.random.key(0), config).model, config))
    trained, _ = split_trainable(model, config.trainable)
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
    """kind -> (count, bytes of the whole arrays) over one run of a compiled program.

    A loop whose length is known only when it runs counts once, a branch as if it were taken.
    """
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for instruction, times, _ in executions(computations(text)):
        kind = instruction.op.removesuffix("-start")
        if kind in COLLECTIVES:
            found[kind][0] += int(times)
            found[kind][1] += int(times) * whole_bytes(instruction)
    return {kind: (count, size) for kind, (count, size) in found.items()}


def group_size(line: str) -> int:
    """Devices that take part in a collective: {{0,1,2,3}}; in short [groups,devices]<=[...]; from jax 0.11 on by the
    axes of the mesh that it runs over, mesh['data'=1,'fsdp'=8] {'fsdp'}."""
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
    """Bytes of the whole arrays of a collective: the larger side. A started one names both, another what comes out."""
    sizes, op = array_bytes(collective.shape), collective.op
    if op in ("all-gather-start", "reduce-scatter-start"):
        half = len(sizes) // 2
        return max(sum(sizes[:half]), sum(sizes[half:]))
    return sum(sizes) * (group_size(collective.line) if op == "reduce-scatter" else 1)
