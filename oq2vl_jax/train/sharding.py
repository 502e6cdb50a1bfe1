"""The mesh, and the one table from logical axes to mesh axes. No PartitionSpec is written anywhere else.

Mesh (data, fsdp): the rows of a batch are split over both axes; parameters and optimizer state over fsdp.
"""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from oq2vl_jax.config import MeshConfig
from oq2vl_jax.errors import UserError

LOGICAL_TO_MESH = {
    "embed": "fsdp", "vocab": None, "heads": None, "mlp": None, "patch": None, "position": None, "layers": None,
    "norm": None,
}  # fmt: skip
"""Every matrix has one "embed" axis; vectors are replicated (0.1 % of the bytes)."""
ROWS = PartitionSpec(("data", "fsdp"))


def make_mesh(config: MeshConfig) -> Mesh:
    """A (data, fsdp) mesh over all devices; at most one of the two sizes is -1 and takes what is left."""
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
    """The shardings of a model, as a pytree of the model's structure.

    An axis that the mesh does not divide stays whole: jax would otherwise refuse the array.
    """

    def shardings(node):
        if not isinstance(node, nnx.Param):
            return node
        value = node.get_value()
        if value is None:  # a part that split_trainable left out
            return node
        axes = [LOGICAL_TO_MESH[name] for name in node.axes]
        matrix = sum(name != "layers" for name in node.axes) > 1
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
    """For every array of a Batch: its rows over all devices."""
    return NamedSharding(mesh, ROWS)


def constrain_rows(mesh: Mesh):
    """The placement of activations between decoder layers: rows over all devices, nothing else split."""
    return lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, ROWS))


def to_global_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch as global arrays."""
    sharding = row_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes of one device's share of arrays (or their shapes)."""
    shapes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings)
    return sum(jax.tree.leaves(shapes))
