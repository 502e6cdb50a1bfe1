"""Converts Hugging Face config.json to ModelConfig. A value that our model does not support is an error.

transformers' own configuration classes read and write the files, because they know the defaults of omitted keys.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from oq2vl_jax.config import DecoderConfig, ModelConfig, Template, VisionConfig
from oq2vl_jax.config_files import from_dict
from oq2vl_jax.errors import UserError

ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh"]] = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""hidden_act of transformers -> our activation."""
POOLED_MODEL_TYPE = "open_qwen2vl"
EXTRA_KEY = "oq2vl_jax"
"""Key of an exported config.json for values that transformers has no field for, so that an import restores them."""
NO_LAST_BLOCK = -2
"""vision_feature_layer of an export: the features leave the second-to-last block."""
VISION, DECODERS = ("siglip_vision_model",), ("qwen2", "qwen3")
"""model_type of the parts that are known. SigLIP2 of a fixed resolution is siglip_vision_model too."""
NAFLEX = (
    "; pictures of their own aspect ratio (NaFlex) are not here, siglip2-so400m-patch14-384 and other SigLIP2 models "
    "of a fixed resolution are"
)
EXPERTS = "; mixtures of experts are not here, dense models are"
NOT_HERE = {
    "siglip2": NAFLEX,
    "siglip2_vision_model": NAFLEX,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "qwen2_5_vl": "; it has an encoder of its own: give its decoder as a Qwen2.5 of that size",
    "qwen3_5": "; its layers of linear attention are not here, Qwen3 is",
}
"""model_type: what would fit instead."""
MEAN = STD = 0.5
BICUBIC = 3


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises UserError with the file's name if it is missing or holds anything else."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}).") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object, got {type(values).__name__}.")
    return values


@contextmanager
def malformed_is_an_error(file: Path) -> Iterator[None]:
    """Turns errors over values of an unexpected type in a JSON file into UserError: the user can correct the file."""
    try:
        yield
    except (TypeError, AttributeError, KeyError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{file}: not a configuration of such a model ({reason}).") from error


def read_vision_config(folder: Path, num_unused_blocks: int = 1) -> VisionConfig:
    """Reads a SigLIP config.json, of the vision model alone or of both towers."""
    values = read_json(folder / "config.json")
    where = str(folder / "config.json")
    with malformed_is_an_error(folder / "config.json"):
        if values.get("model_type") == "siglip":
            values = values.get("vision_config", {}) | {"model_type": "siglip_vision_model"}
        return vision_config_from(values, where, num_unused_blocks)


def vision_config_from(values: dict[str, Any], where: str, num_unused_blocks: int = 1) -> VisionConfig:
    """num_unused_blocks: blocks after the one whose output is used (1 = features of the second-to-last block)."""
    from transformers import SiglipVisionConfig

    check_model_type(values, VISION, where)
    theirs = parse(SiglipVisionConfig, values, where)
    if theirs.hidden_act not in ACTIVATIONS:
        raise UserError(f"{where}: hidden_act is {theirs.hidden_act!r}, expected one of {', '.join(ACTIVATIONS)}.")
    if theirs.num_channels != 3:
        raise UserError(f"{where}: num_channels is {theirs.num_channels}, expected 3.")
    num_layers = theirs.num_hidden_layers - num_unused_blocks + 1
    if num_layers < 2:
        total = theirs.num_hidden_layers
        raise UserError(f"{where}: the features leave {num_unused_blocks} of {total} blocks unused; none is left.")
    return VisionConfig(
        image_size=theirs.image_size,
        patch_size=theirs.patch_size,
        hidden_size=theirs.hidden_size,
        intermediate_size=theirs.intermediate_size,
        num_layers=num_layers,
        num_heads=theirs.num_attention_heads,
        activation=ACTIVATIONS[theirs.hidden_act],
        layer_norm_eps=theirs.layer_norm_eps,
    )


def read_decoder_config(folder: Path) -> DecoderConfig:
    file = folder / "config.json"
    with malformed_is_an_error(file):
        return decoder_config_from(read_json(file), str(file))


def decoder_config_from(values: dict[str, Any], where: str) -> DecoderConfig:
    check_model_type(values, DECODERS, where)
    kind = values["model_type"]
    theirs = parse(decoder_class(kind), values, where)
    rope = theirs.rope_parameters
    problems = []
    if kind == "qwen3" and theirs.attention_bias:
        problems.append("attention_bias is true, and no published Qwen3 has biases")
    if theirs.hidden_act != "silu":
        problems.append(f"hidden_act is {theirs.hidden_act!r}, expected 'silu'")
    if theirs.use_sliding_window:
        problems.append("use_sliding_window is true, which this model does not do")
    if rope.get("rope_type", "default") != "default":
        problems.append(f"rope_type is {rope['rope_type']!r}, expected 'default'")
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}.")
    return DecoderConfig(
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        intermediate_size=theirs.intermediate_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        num_kv_heads=theirs.num_key_value_heads or theirs.num_attention_heads,
        head_dim=getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        rope_theta=float(rope["rope_theta"]),
        rms_norm_eps=theirs.rms_norm_eps,
        tie_word_embeddings=bool(theirs.tie_word_embeddings),
        kind=kind,
    )


def decoder_class(kind: str) -> Any:
    """Returns transformers' configuration class of a decoder."""
    import transformers

    return {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[kind]


def read_llava_config(folder: Path) -> tuple[ModelConfig, Template | None, int]:
    """Reads the config.json of a Llava-style model with our parts, or of one of our exports.

    Returns its ModelConfig, the template that an export names (else None), and the number of blocks in the vision
    encoder.
    """
    file = folder / "config.json"
    with malformed_is_an_error(file):
        return llava_config_from(read_json(file), folder, file)


def llava_config_from(values: dict[str, Any], folder: Path, file: Path) -> tuple[ModelConfig, Template | None, int]:
    from transformers import LlavaConfig

    if values.get("model_type") not in ("llava", POOLED_MODEL_TYPE):
        raise UserError(
            f"{file}: model_type is {values.get('model_type')!r}, expected 'llava' or '{POOLED_MODEL_TYPE}'; "
            "SigLIP and Qwen alone come in by --vision and --decoder."
        )
    extra = values.get(EXTRA_KEY, {})
    for part, expected in (("vision_config", VISION), ("text_config", DECODERS)):
        check_model_type(values.get(part, {}), expected, f"{file}: {part}")
    theirs = parse(LlavaConfig, values | {"model_type": "llava"}, str(file))
    check_llava_parts(theirs, str(file))
    check_image_processor(folder, theirs.vision_config.image_size)
    layers, leaves = theirs.vision_config.num_hidden_layers, theirs.vision_feature_layer
    num_unused_blocks = -1 - leaves if leaves < 0 else layers - leaves
    vision = vision_config_from(theirs.vision_config.to_dict(), f"{file}: vision_config", num_unused_blocks)
    text = theirs.text_config.to_dict() | {"tie_word_embeddings": theirs.tie_word_embeddings}
    decoder = decoder_config_from(text, f"{file}: text_config")
    model = {
        "vision": dataclasses.asdict(vision),
        "decoder": dataclasses.asdict(decoder) | {"rope_inv_freq": extra.get("rope_inv_freq", "float32")},
        "num_visual_tokens": values.get("num_visual_tokens", vision.num_patches),
        "image_token_id": theirs.image_token_index,
        "projector": {"kind": values.get("projector_kind", "avg_pool_mlp")},
    }
    template = extra.get("template")
    if template not in (None, *get_args(Template)):
        raise UserError(
            f"{file}: {EXTRA_KEY}: template is {template!r}, expected one of {', '.join(get_args(Template))}."
        )
    return from_dict(ModelConfig, model, str(file)), template, layers


def check_llava_parts(theirs: Any, where: str) -> None:
    expected = {
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_select_strategy": "full",
    }
    problems = [
        f"{key} is {getattr(theirs, key)!r}, expected {value!r}"
        for key, value in expected.items()
        if getattr(theirs, key) != value
    ]
    if not isinstance(theirs.vision_feature_layer, int):
        problems.append(f"vision_feature_layer is {theirs.vision_feature_layer}, expected one layer")
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}.")


def check_image_processor(folder: Path, image_size: int) -> None:
    """Raises UserError for a model whose preprocessing is not ours (square, bicubic, mean = std = 0.5)."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            continue
        values = read_json(folder / name)
        values = values.get("image_processor", values)
        expected = {
            "image_mean": [MEAN] * 3,
            "image_std": [STD] * 3,
            "resample": BICUBIC,
            "size": {"height": image_size, "width": image_size},
        }
        problems = [
            f"{key} is {values[key]!r}, expected {value!r}"
            for key, value in expected.items()
            if key in values and values[key] != value
        ]
        if problems:
            raise UserError(f"{folder / name}: {'; '.join(problems)}.")


def check_model_type(values: dict[str, Any], expected: tuple[str, ...], where: str) -> None:
    found = values.get("model_type")
    if found not in expected:
        why = NOT_HERE.get(str(found), "")
        raise UserError(f"{where}: model_type is {found!r}, expected {' or '.join(map(repr, expected))}{why}.")


def parse(config_class: Any, values: dict[str, Any], where: str) -> Any:
    """Parses a config with transformers' class. Raises UserError if the class rejects a value."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return config_class.from_dict(values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {str(error).splitlines()[-1].strip()}") from error
