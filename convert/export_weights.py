"""Maps the parameters of a checkpoint to the tensors of a layout, one row of the weight table at a time."""

from collections.abc import Iterator

import numpy as np

from oq2vl_jax.errors import UserError

from .checkpoint_stream import CheckpointReader
from .weight_map import Shape, their_shape, unused_vision, weights_of


def exported_shapes(layout: str, shapes: dict[str, Shape], filler: dict[str, Shape]) -> dict[str, Shape]:
    """Returns the shape of every tensor of an export, in the order of `exported_tensors`.

    Raises UserError for a parameter that no row of the weight table exports.
    """
    check_all_exported(layout, shapes)
    return {weight.theirs: their_shape(weight, shapes) for weight in weights_of(layout, shapes)} | filler


def check_all_exported(layout: str, shapes: dict[str, Shape]) -> None:
    """Raises UserError for a parameter that the export would silently drop."""
    known = {name for weight in weights_of(layout, shapes) for name in weight.row.ours}
    missing = sorted(set(shapes) - known)
    if missing:
        raise UserError(
            f"the parameter {missing[0]} {shapes[missing[0]]} has no row in the weight table for the layout {layout}"
            f"{f', and {len(missing) - 1} more' if len(missing) > 1 else ''}; add it to convert/weight_map.py."
        )


def vision_filler(layout: str, shapes: dict[str, Shape], has_pooling_head: bool) -> dict[str, Shape]:
    """Returns the shapes of weights after the features that a layout requires; they are written as zeros."""
    unused = unused_vision(layout, shapes)
    return {name: shape for name, shape in unused.items() if has_pooling_head or ".head." not in name}


def exported_tensors(
    layout: str, reader: CheckpointReader, dtype: np.dtype, filler: dict[str, Shape]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, contiguous tensor of type `dtype`): first the model's weights, then the filler.

    Raises UserError as exported_shapes does.
    """
    check_all_exported(layout, reader.shapes)
    row = arrays = None
    for weight in weights_of(layout, reader.shapes):
        if weight.row is not row:
            arrays = None  # free the arrays before the next are read
            row, arrays = weight.row, [reader.read(name).astype(dtype) for name in weight.row.ours]
        assert arrays is not None
        parts = arrays if weight.layer is None else [array[weight.layer] for array in arrays]
        # Always a copy: a view would keep the stacked parameter alive until its shard is complete.
        yield weight.theirs, np.array(weight.row.transform.to_theirs(parts), order="C")
    for name, shape in filler.items():
        yield name, np.zeros(shape, dtype)
