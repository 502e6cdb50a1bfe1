"""Defines the mesh, the only table from logical to mesh axes, and the collectives. No PartitionSpec stands elsewhere.

Mesh (data, fsdp): the rows of a batch are split over both axes; parameters and optimizer state over fsdp. The step
itself runs per device (jax.shard_map); the functions below gather its weights and reduce its gradients:

    mesh.sharding   zero1                                  fsdp
    weights         gathered once a step, all of them      the decoder's gathered layer by layer, in every pass
    gradients       summed over microbatches in float32,   the decoder's reduced and scattered layer by layer in the
                    then reduced and scattered once        type of the computation, then summed in float32 as shards
"""

import functools
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from oq2vl_jax.config import MeshConfig
from oq2vl_jax.errors import UserError
from oq2vl_jax.memory import host_bytes
from oq2vl_jax.trees import is_matrix

LOGICAL_TO_MESH = {
    "embed": "fsdp", "vocab": None, "heads": None, "mlp": None, "patch": None, "position": None, "layers": None,
    "norm": None, "rank": None,
}  # fmt: skip
"""Every matrix has one "embed" axis; vectors are replicated (0.1 % of the bytes)."""
ROW_AXES = ("data", "fsdp")
ROWS = PartitionSpec(ROW_AXES)
WHOLE = -1
"""In place of a dimension, for a parameter that is not split."""


def make_mesh(config: MeshConfig) -> Mesh:
    """Makes a (data, fsdp) mesh over all devices; at most one of the two sizes may be -1, for all other devices."""
    num_devices = len(jax.devices())
    sizes = [config.data, config.fsdp]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and num_devices % known == 0:
        sizes[sizes.index(-1)] = num_devices // known
    if min(sizes) < 1 or math.prod(sizes) != num_devices:
        raise UserError(
            f"mesh.data = {config.data} times mesh.fsdp = {config.fsdp} does not fit {num_devices} devices; "
            "leave one of them at -1."
        )
    return jax.make_mesh(tuple(sizes), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def parameter_shardings(model: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a model, as a pytree of the model's structure.

    An axis that the mesh does not divide is not split, because jax would refuse the array.
    """

    def shardings(node):
        if not isinstance(node, nnx.Param):
            return node
        value = node.get_value()
        if value is None:  # a part that split_trainable left out
            return node
        axes = [LOGICAL_TO_MESH[name] for name in node.axes]
        matrix = is_matrix(node)
        sizes = [mesh.shape[axis] if axis else 1 for axis in axes]
        spec = [
            axis if matrix and dim % size == 0 else None
            for axis, dim, size in zip(axes, value.shape, sizes, strict=True)
        ]
        return node.replace(NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(shardings, model, is_leaf=lambda node: isinstance(node, nnx.Param))


def replicated(mesh: Mesh) -> Any:
    return NamedSharding(mesh, PartitionSpec())


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of every array of a Batch: its rows are split over all devices."""
    return NamedSharding(mesh, ROWS)


def gathered_dims(tree: Any, mesh: Mesh) -> Any:
    """Returns the split dimension of every parameter, or WHOLE, as a pytree of the parameters' structure."""

    def dim_of(sharding: NamedSharding) -> int:
        spec = tuple(sharding.spec)
        return spec.index("fsdp") if "fsdp" in spec and mesh.shape["fsdp"] > 1 else WHOLE

    return jax.tree.map(dim_of, parameter_shardings(tree, mesh))


def gather(tree: Any, dims: Any) -> Any:
    """Gathers whole parameters from their shards, inside shard_map. Its VJP reduces and scatters gradients."""

    def whole(x: jax.Array, dim: int) -> jax.Array:
        if dim == WHOLE:
            return x
        return gather_over_gloo(x, dim) if is_gloo() else jax.lax.all_gather(x, "fsdp", axis=dim, tiled=True)

    return jax.tree.map(whole, tree, dims)


def layer_gather(stacked_dims: Any) -> Any:
    """Returns a function that gathers one layer of a stack, just before the layer runs (model.layers.Compute)."""

    def gather_layer(layer: Any) -> Any:
        return gather(layer, jax.tree.map(lambda dim: dim if dim == WHOLE else dim - 1, stacked_dims))

    return gather_layer


def reduce_gradients(gradients: Any, dims: Any, dims_of_whole: Any, mesh: Mesh) -> Any:
    """Returns this device's shard of the gradients summed over all devices, inside shard_map.

    dims_of_whole: WHOLE for gradients that the backward pass of `gather` has summed over fsdp and scattered already.
    """

    def reduce(x: jax.Array, dim: int, dim_of_whole: int) -> jax.Array:
        if dim == WHOLE:
            return jax.lax.psum(x, ROW_AXES) if mesh.size > 1 else x  # of one device, XLA would copy x
        if dim_of_whole != WHOLE:
            x = scattered_sum(x, dim)
        return jax.lax.psum(x, "data") if mesh.shape["data"] > 1 else x

    return jax.tree.map(reduce, gradients, dims, dims_of_whole)


def is_gloo() -> bool:
    """Returns whether collectives go over Gloo: several processes on CPUs."""
    return jax.distributed.is_initialized() and jax.default_backend() == "cpu"


def scattered_sum(x: jax.Array, dim: int) -> jax.Array:
    """Returns this device's part of the sum over fsdp, inside shard_map.

    Gloo's reduce-scatter returns wrong sums on rank 0 now and then, without an error (jax issue 40830, seen here with
    0.10.2: the norm of tiny's gradients off by 3e-4); its all-reduce does not.
    """
    if not is_gloo():
        return jax.lax.psum_scatter(x, "fsdp", scatter_dimension=dim, tiled=True)
    whole, size = jax.lax.psum(x, "fsdp"), x.shape[dim] // jax.lax.axis_size("fsdp")
    return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index("fsdp") * size, size, dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_over_gloo(x: jax.Array, dim: int) -> jax.Array:
    return jax.lax.all_gather(x, "fsdp", axis=dim, tiled=True)


gather_over_gloo.defvjp(
    lambda x, dim: (gather_over_gloo(x, dim), None), lambda dim, _, gradient: (scattered_sum(gradient, dim),)
)


def specs(shardings: Any) -> Any:
    """Returns the PartitionSpecs of shardings, as shard_map takes them."""
    return jax.tree.map(lambda sharding: sharding.spec, shardings)


def to_global_batch(batch: Any, mesh: Mesh) -> Any:
    """Turns this process's rows of a batch into global arrays."""
    sharding = row_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Returns the bytes of one device's shards of arrays (or of their shapes)."""
    shapes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings)
    return sum(jax.tree.leaves(shapes))


def device_bytes() -> int:
    """Returns the memory of one device that jax may use; CPU devices share the machine's."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit or host_bytes() // jax.local_device_count()
