"""Handles models as trees of parameters: names them, tells matrices apart, and splits a model in two."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def named_arrays(tree: Any) -> dict[str, Any]:
    """Returns {"decoder.layers.mlp.up_proj.kernel": array, ...} of a model or an optimizer state."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def from_named_arrays(like: Any, arrays: dict[str, Any]) -> Any:
    """Inverse of named_arrays, in the structure of `like`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[path_name(path)], like)


def path_name(path) -> str:
    keys = (jax.tree_util.keystr((key,), simple=True) for key in path)
    return ".".join(key for key in keys if key != "value")


def is_matrix(parameter: nnx.Param) -> bool:
    """Returns whether a parameter has two axes or more besides the one that stacks layers."""
    return sum(name != "layers" for name in parameter.axes) > 1


def split_parts(model: Any, is_first: Callable[[tuple[Any, ...]], bool]) -> tuple[Any, Any]:
    """Returns the model twice, each with None for the parameters of the other. is_first takes a parameter's path."""
    first = jax.tree_util.tree_map_with_path(lambda path, x: x if is_first(path) else None, model)
    second = jax.tree_util.tree_map_with_path(lambda path, x: None if is_first(path) else x, model)
    return first, second


def merge_parts(first: Any, second: Any) -> Any:
    """Inverse of split_parts."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None)
