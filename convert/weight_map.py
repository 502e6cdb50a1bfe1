"""The one weight table: their tensor name <-> our parameter <-> transform, for every layout that is read or written.

Prefixes combine four parts (vision with the names of Hugging Face or timm, projector, decoder) into layouts:

    layout        vision                        projector               decoder (Qwen2 or Qwen3)
    siglip        vision_model.                 -                       -
    timm          (none)                        -                       -
    qwen2         -                             -                       (none)
    llava         vision_tower.vision_model.    multi_modal_projector.  language_model.
    open_qwen2vl  model.vision_tower.           model.multi_modal_..    model.language_model. and lm_head
    prismatic     vision_backbone.featurizer.   projector.              llm_backbone.llm.

`clip` is separate: the two towers of a CLIP that scores data.

`{layer}` in their name is the number of a layer; our parameter holds all layers in one array [L, ...]. timm fuses q, k
and v, so one of its tensors holds three of our parameters. Transforms move values and never compute; both directions
are exact, bit for bit.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Transform(NamedTuple):
    """Converts one of their tensors to our parameters of one layer, in the order of Row.ours, and back."""

    to_ours: Callable[[np.ndarray], list[np.ndarray]]
    to_theirs: Callable[[list[np.ndarray]], np.ndarray]


class Row(NamedTuple):
    """theirs: a tensor name, with {layer} if our parameters are stacked; ours: the parameters that the tensor holds."""

    theirs: str
    ours: tuple[str, ...]
    transform: Transform


class Weight(NamedTuple):
    """One tensor of a layout: a row at one layer (None if the parameter is not stacked)."""

    theirs: str
    layer: int | None
    row: Row


def _patches_to_theirs(parts: list[np.ndarray]) -> np.ndarray:
    """Reshapes [p * p * 3, D] to a convolution's [D, 3, p, p]."""
    kernel = parts[0]
    side = math.isqrt(kernel.shape[0] // 3)
    return kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


SAME = Transform(lambda x: [x], lambda parts: parts[0])
TRANSPOSED = Transform(lambda x: [x.T], lambda parts: parts[0].T)  # [out, in] <-> [in, out]
PATCHES = Transform(lambda x: [x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])], _patches_to_theirs)
ONE_MORE_AXIS = Transform(lambda x: [x[0]], lambda parts: parts[0][None])  # timm's position embedding is [1, P, D]
FUSED = Transform(lambda x: np.split(x, 3), np.concatenate)  # biases [3 D]
FUSED_TRANSPOSED = Transform(
    lambda x: [part.T for part in np.split(x, 3)], lambda parts: np.concatenate([part.T for part in parts])
)


def _linear(theirs: str, ours: str, has_bias: bool = True) -> list[Row]:
    rows = [Row(f"{theirs}.weight", (f"{ours}.kernel",), TRANSPOSED)]
    return [*rows, Row(f"{theirs}.bias", (f"{ours}.bias",), SAME)] if has_bias else rows


def _norm(theirs: str, ours: str, has_bias: bool = True) -> list[Row]:
    rows = [Row(f"{theirs}.weight", (f"{ours}.scale",), SAME)]
    return [*rows, Row(f"{theirs}.bias", (f"{ours}.bias",), SAME)] if has_bias else rows


def _patch_embedding(theirs: str) -> list[Row]:
    return [
        Row(f"{theirs}.weight", ("vision.patch_embedding.kernel",), PATCHES),
        Row(f"{theirs}.bias", ("vision.patch_embedding.bias",), SAME),
    ]


def _vision_huggingface() -> list[Row]:
    rows = _patch_embedding("embeddings.patch_embedding")
    rows.append(Row("embeddings.position_embedding.weight", ("vision.position_embedding",), SAME))
    return rows + _blocks("", "vision.")


def _blocks(their_prefix: str, our_prefix: str) -> list[Row]:
    """Rows of the encoder blocks in Hugging Face's SigLIP and CLIP."""
    theirs, ours, rows = f"{their_prefix}encoder.layers.{{layer}}", f"{our_prefix}layers", []
    for name in ("layer_norm1", "layer_norm2"):
        rows += _norm(f"{theirs}.{name}", f"{ours}.{name}")
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        rows += _linear(f"{theirs}.self_attn.{name}", f"{ours}.self_attn.{name}")
    for name in ("fc1", "fc2"):
        rows += _linear(f"{theirs}.mlp.{name}", f"{ours}.mlp.{name}")
    return rows


def _vision_timm() -> list[Row]:
    theirs, ours = "blocks.{layer}", "vision.layers"
    fused = [f"{ours}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    return [
        *_patch_embedding("patch_embed.proj"),
        Row("pos_embed", ("vision.position_embedding",), ONE_MORE_AXIS),
        *_norm(f"{theirs}.norm1", f"{ours}.layer_norm1"),
        Row(f"{theirs}.attn.qkv.weight", tuple(f"{name}.kernel" for name in fused), FUSED_TRANSPOSED),
        Row(f"{theirs}.attn.qkv.bias", tuple(f"{name}.bias" for name in fused), FUSED),
        *_linear(f"{theirs}.attn.proj", f"{ours}.self_attn.out_proj"),
        *_norm(f"{theirs}.norm2", f"{ours}.layer_norm2"),
        *_linear(f"{theirs}.mlp.fc1", f"{ours}.mlp.fc1"),
        *_linear(f"{theirs}.mlp.fc2", f"{ours}.mlp.fc2"),
    ]


def _decoder() -> list[Row]:
    """Rows of Qwen2Model and Qwen3Model, without the head; names as in Qwen2ForCausalLM without the prefix "model.".
    Rows of parameters that a kind lacks are skipped (weights_of)."""
    theirs, ours = "layers.{layer}", "decoder.layers"
    rows = [Row("embed_tokens.weight", ("decoder.embed_tokens",), SAME)]
    for name in ("input_layernorm", "post_attention_layernorm"):
        rows += _norm(f"{theirs}.{name}", f"{ours}.{name}", has_bias=False)
    for name in ("q_proj", "k_proj", "v_proj"):
        rows += _linear(f"{theirs}.self_attn.{name}", f"{ours}.self_attn.{name}")
    for name in ("q_norm", "k_norm"):
        rows += _norm(f"{theirs}.self_attn.{name}", f"{ours}.self_attn.{name}", has_bias=False)
    rows += _linear(f"{theirs}.self_attn.o_proj", f"{ours}.self_attn.o_proj", has_bias=False)
    for name in ("gate_proj", "up_proj", "down_proj"):
        rows += _linear(f"{theirs}.mlp.{name}", f"{ours}.mlp.{name}", has_bias=False)
    return [*rows, *_norm("norm", "decoder.norm", has_bias=False)]


def _clip() -> list[Row]:
    """Rows of CLIPModel. Both towers have the same kind of block."""
    rows = [
        Row("vision_model.embeddings.class_embedding", ("image_tower.class_embedding",), SAME),
        Row("vision_model.embeddings.patch_embedding.weight", ("image_tower.patch_embedding.kernel",), PATCHES),
        Row("vision_model.embeddings.position_embedding.weight", ("image_tower.position_embedding",), SAME),
        *_norm("vision_model.pre_layrnorm", "image_tower.pre_layernorm"),  # transformers' spelling
        *_norm("vision_model.post_layernorm", "image_tower.post_layernorm"),
        *_linear("visual_projection", "image_tower.projection", has_bias=False),
        Row("text_model.embeddings.token_embedding.weight", ("text_tower.token_embedding",), SAME),
        Row("text_model.embeddings.position_embedding.weight", ("text_tower.position_embedding",), SAME),
        *_norm("text_model.final_layer_norm", "text_tower.final_layer_norm"),
        *_linear("text_projection", "text_tower.projection", has_bias=False),
    ]
    return [*rows, *_blocks("vision_model.", "image_tower."), *_blocks("text_model.", "text_tower.")]


def _prefixed(prefix: str, rows: list[Row]) -> list[Row]:
    return [row._replace(theirs=prefix + row.theirs) for row in rows]


def _head(theirs: str) -> list[Row]:
    return [Row(theirs, ("decoder.lm_head",), SAME)]


def _projector(first: str, second: str) -> list[Row]:
    return [*_linear(first, "projector.fc1"), *_linear(second, "projector.fc2")]


LAYOUTS: dict[str, list[Row]] = {
    "siglip": _prefixed("vision_model.", _vision_huggingface()),
    "timm": _vision_timm(),
    "qwen2": [*_prefixed("model.", _decoder()), *_head("lm_head.weight")],
    "llava": [
        *_prefixed("vision_tower.vision_model.", _vision_huggingface()),
        *_projector("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
        *_prefixed("language_model.model.", _decoder()),
        *_head("language_model.lm_head.weight"),
    ],
    "open_qwen2vl": [
        *_prefixed("model.vision_tower.", _vision_huggingface()),
        *_projector("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
        *_prefixed("model.language_model.", _decoder()),
        *_head("lm_head.weight"),
    ],
    "prismatic": [
        *_prefixed("vision_backbone.featurizer.", _vision_timm()),
        *_projector("projector.mlp_projector.0", "projector.mlp_projector.2"),
        *_prefixed("llm_backbone.llm.model.", _decoder()),
        *_head("llm_backbone.llm.lm_head.weight"),
    ],
    "clip": _clip(),
}
"""The lm_head row is for models with an untied head; `weights_of` skips the rows of parameters that a model lacks."""


def weights_of(layout: str, shapes: dict[str, Shape]) -> list[Weight]:
    """Lists every tensor of a layout that holds a parameter of `shapes` (our names), all layers of a row together."""
    weights = []
    for row in LAYOUTS[layout]:
        if row.ours[0] not in shapes:
            continue
        if "{layer}" in row.theirs:
            num_layers = shapes[row.ours[0]][0]
            weights += [Weight(row.theirs.format(layer=i), i, row) for i in range(num_layers)]
        else:
            weights.append(Weight(row.theirs, None, row))
    return weights


def their_shape(weight: Weight, shapes: dict[str, Shape]) -> Shape:
    """Returns the shape of one of their tensors, from the shapes of our parameters."""
    ours = [shapes[name] if weight.layer is None else shapes[name][1:] for name in weight.row.ours]
    return weight.row.transform.to_theirs([np.empty(shape, np.bool_) for shape in ours]).shape


def unused_vision(layout: str, shapes: dict[str, Shape]) -> dict[str, Shape]:
    """Returns the shapes of the vision weights that a layout has and our model does not hold.

    They come after the features: the last block, the final norm, the attention pool. Imports leave them out. Exports
    write zeros for those that a layout requires; no output depends on them.
    """
    num_blocks, width, hidden = shapes["vision.layers.mlp.fc1.kernel"]
    rows = [row for row in LAYOUTS[layout] if row.ours[0].startswith("vision.layers.")]
    unused = {}
    for row in rows:
        unused[row.theirs.format(layer=num_blocks)] = their_shape(Weight(row.theirs, 0, row), shapes)
    prefix = rows[0].theirs.split("blocks.{layer}" if "blocks.{layer}" in rows[0].theirs else "encoder.layers")[0]
    mlp = {
        "mlp.fc1.weight": (hidden, width), "mlp.fc1.bias": (hidden,),
        "mlp.fc2.weight": (width, hidden), "mlp.fc2.bias": (width,),
    }  # fmt: skip
    if "blocks.{layer}" in rows[0].theirs:
        pool = {
            "latent": (1, 1, width), "q.weight": (width, width), "q.bias": (width,),
            "kv.weight": (2 * width, width), "kv.bias": (2 * width,),
            "proj.weight": (width, width), "proj.bias": (width,), "norm.weight": (width,), "norm.bias": (width,),
        }  # fmt: skip
        norm, head = "norm", {f"attn_pool.{name}": shape for name, shape in (pool | mlp).items()}
    else:
        pool = {
            "probe": (1, 1, width), "attention.in_proj_weight": (3 * width, width),
            "attention.in_proj_bias": (3 * width,), "attention.out_proj.weight": (width, width),
            "attention.out_proj.bias": (width,), "layernorm.weight": (width,), "layernorm.bias": (width,),
        }  # fmt: skip
        norm, head = "post_layernorm", {f"head.{name}": shape for name, shape in (pool | mlp).items()}
    tail = {f"{norm}.weight": (width,), f"{norm}.bias": (width,)} | head
    return unused | {prefix + name: shape for name, shape in tail.items()}
