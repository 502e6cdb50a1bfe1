"""Maps external tensors through the weight table to our parameters. Each is used, listed as left out, or an error."""

import re
from collections import defaultdict
from collections.abc import Callable

import jax
import numpy as np

from oq2vl_jax.config import ModelConfig
from oq2vl_jax.errors import UserError, hint
from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
from oq2vl_jax.trees import named_arrays

from .checkpoint_stream import LazyArray
from .tensor_files import TensorSource
from .weight_map import LAYOUTS, Weight, their_shape, unused_vision, weights_of

MAX_PROBLEMS_SHOWN = 6
ROWS_COMPARED_AT_ONCE = 8192

OTHER_TOWER = re.compile(r"(text_model\.|text\.|logit_scale$|logit_bias$)")
"""The text tower beside a SigLIP encoder, as Hugging Face and open_clip name it."""
BUFFERS = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq)$")
POOLING_HEAD = re.compile(r".*?\b(attn_pool|head)\.")
BLOCK_NUMBER = re.compile(r".*?\b(?:blocks|encoder\.layers)\.(\d+)\.")


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of a model."""
    model = jax.eval_shape(lambda: OpenQwen2VL(jax.random.key(0), config))
    return {name: tuple(array.shape) for name, array in named_arrays(model).items()}


class Import:
    """Collects parameters from one or more sources; `finish` raises the problems of all sources together."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        """shapes: name -> shape of every parameter; see parameter_shapes."""
        self.shapes = shapes
        self.parameters: dict[str, LazyArray] = {}
        self.left_out: list[str] = []
        self._problems: list[str] = []
        self._tied_heads: list[tuple[TensorSource, str, str]] = []

    def add(
        self,
        layout: str,
        source: TensorSource,
        parts: tuple[str, ...] = ("",),
        num_vision_blocks: int | None = None,
    ) -> None:
        """Takes from a source every parameter of a layout whose name begins with one of `parts` (default: all).

        num_vision_blocks: blocks of the source's encoder; `left_out` lists the tensors of those after the features.
        """
        weights = [weight for weight in weights_of(layout, self.shapes) if weight.row.ours[0].startswith(parts)]
        expected = {weight.theirs: their_shape(weight, self.shapes) for weight in weights}
        unused = self._unused(layout, source, expected, num_vision_blocks)
        unexpected = [name for name in source.shapes if name not in expected and name not in unused]
        self.left_out += sorted(unused)
        for name, shape in expected.items():
            if name not in source.shapes:
                self._problems.append(f"{source.where}: {name} is missing{way_out(name, unexpected)}")
            elif source.shapes[name] != shape:
                self._problems.append(f"{source.where}: {name} has shape {source.shapes[name]}, expected {shape}")
        self._problems += [f"{source.where}: {name} has no place in this model" for name in unexpected]
        by_parameter = defaultdict(list)
        for weight in weights:
            for part, name in enumerate(weight.row.ours):
                by_parameter[name].append((weight, part))
        for name, pieces in by_parameter.items():
            self.parameters[name] = LazyArray(self.shapes[name], _maker(source, pieces, self.shapes[name]))

    def add_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Adds parameters that are already in memory, such as a fresh projector."""
        for name, array in arrays.items():
            self.parameters[name] = LazyArray(array.shape, lambda array=array: array)

    def finish(self) -> dict[str, LazyArray]:
        """Returns every parameter of the model. Raises UserError with all problems found."""
        missing = sorted(set(self.shapes) - set(self.parameters))
        assert not missing, missing
        if self._problems:
            shown = "; ".join(self._problems[:MAX_PROBLEMS_SHOWN])
            left = len(self._problems) - MAX_PROBLEMS_SHOWN
            raise UserError(f"the weights do not fit the model: {shown}" + (f"; and {left} more." if left > 0 else "."))
        for source, head, embedding in self._tied_heads:
            check_tied(source, head, embedding)
        return self.parameters

    def _unused(self, layout: str, source: TensorSource, expected: dict, num_vision_blocks: int | None) -> set[str]:
        """Returns the names in a source that are left out on purpose."""
        unused = {name for name in source.shapes if BUFFERS.search(name)}
        if layout == "clip":  # the temperature of the contrastive loss; a score is the cosine alone
            unused |= {"logit_scale"} & set(source.shapes)
        if layout in ("siglip", "timm"):
            unused |= {name for name in source.shapes if OTHER_TOWER.match(name)}
        if "decoder.lm_head" not in self.shapes:
            tied = [row.theirs for row in LAYOUTS[layout] if row.ours[0] == "decoder.lm_head"]
            embedding = next((row.theirs for row in LAYOUTS[layout] if row.ours[0] == "decoder.embed_tokens"), "")
            for head in tied:
                if head in source.shapes and source.shapes.get(embedding) == expected[embedding]:
                    self._tied_heads.append((source, head, embedding))
                    unused.add(head)
        if any(row.ours[0].startswith("vision.") for row in LAYOUTS[layout]):
            known = unused_vision(layout, self.shapes)
            unused |= {name for name in source.shapes if name in known}
            num_held = self.shapes["vision.layers.mlp.fc1.kernel"][0]
            for name in source.shapes:
                number = BLOCK_NUMBER.match(name)
                if number and num_held <= int(number[1]) < (num_vision_blocks or num_held + 1):
                    unused.add(name)
        return unused


def _maker(source: TensorSource, pieces: list[tuple[Weight, int]], shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    """Returns a function that reads one parameter. Each piece is a part of one of their tensors, at one layer."""

    def make() -> np.ndarray:
        array = np.empty(shape, np.float32)
        with source.opened() as read:
            for weight, part in pieces:
                index = ... if weight.layer is None else weight.layer
                array[index] = weight.row.transform.to_ours(read(weight.theirs))[part]
        return array

    return make


def way_out(name: str, unexpected: list[str]) -> str:
    """Returns a hint for a missing tensor: the nearest unexpected name, or the setting that ties the head."""
    if "lm_head" in name:
        return "; if the head is the embedding, set tie_word_embeddings to true in the configuration"
    nearest = hint(name, unexpected).removeprefix(" (did you mean ").removesuffix("?)")
    return f" (there is {nearest})" if nearest else ""


def check_tied(source: TensorSource, head: str, embedding: str) -> None:
    """Raises UserError unless a stored head equals the embedding that it is tied to."""
    with source.opened() as read:
        stored, expected = read(head), read(embedding)
        same = stored.shape == expected.shape and all(
            np.array_equal(stored[i : i + ROWS_COMPARED_AT_ONCE], expected[i : i + ROWS_COMPARED_AT_ONCE])
            for i in range(0, len(stored), ROWS_COMPARED_AT_ONCE)
        )
    if not same:
        raise UserError(
            f"{source.where}: {head} differs from {embedding}, but the configuration says they are tied "
            "(tie_word_embeddings); set it to false if the head is meant to be its own."
        )


def summarize_left_out(names: list[str]) -> str:
    """Returns '29 tensors not used: vision_model.encoder.layers.26 (16), vision_model.head (11), ...'."""
    if not names:
        return ""
    groups = defaultdict(int)
    for name in names:
        groups[_group(name)] += 1
    parts = ", ".join(f"{group} ({count})" for group, count in sorted(groups.items()))
    return f"{len(names)} tensors not used: {parts}"


def _group(name: str) -> str:
    """Returns the group of a left-out tensor: the text tower, a block, the pooling head or a single module."""
    if name == "logit_scale":
        return name
    if OTHER_TOWER.match(name):
        return "text tower"
    number, head = BLOCK_NUMBER.match(name), POOLING_HEAD.match(name)
    if number or head:
        return (number or head)[0].rstrip(".")  # pyright: ignore[reportOptionalSubscript]
    return name.rsplit(".", 1)[0]
