"""Reads and writes config.json in a run directory of the published code ("Prismatic" layout).

    RUN_DIR/config.json                          {"model": {ids, arch_specifier, ...}, "stage": ..., "mount_path": ...}
    RUN_DIR/checkpoints/latest-checkpoint.pt     {"model": {"projector", "llm_backbone", maybe "vision_backbone"}}

That file names the parts by id, without their sizes. If this project wrote it, the key "oq2vl_jax" holds the sizes.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from oq2vl_jax.config import ModelConfig, Template, VisionConfig
from oq2vl_jax.config_files import from_dict
from oq2vl_jax.errors import UserError

from .hf_config import EXTRA_KEY, malformed_is_an_error, read_decoder_config, read_json, read_vision_config

LATEST = "checkpoints/latest-checkpoint.pt"
PUBLISHED_VISION, PUBLISHED_DECODER = "siglip-vit-so400m-384px", "qwen2.5-1.5b-instruct"
HUB_OF_DECODER = {
    "qwen2.5-1.5b-instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
}
"""The decoder ids that the published code knows -> hub ids."""
DEFAULT_VISUAL_TOKENS = 144
RESIZE = "resize-naive"
"""Bicubic to a square, aspect ignored: the preprocessing of this project."""


def decoder_on_the_hub(run_dir: Path) -> str:
    """Returns the hub id of the decoder that a run names. Raises UserError for an unknown name."""
    model = read_json(run_dir / "config.json").get("model")
    name = model.get("llm_backbone_id") if isinstance(model, dict) else None
    if name not in HUB_OF_DECODER:
        raise UserError(
            f"{run_dir / 'config.json'}: llm_backbone_id is {name!r}, expected one of {', '.join(HUB_OF_DECODER)}; "
            "or name the decoder's folder in --decoder."
        )
    return HUB_OF_DECODER[name]


def read_run(run_dir: Path, vision: Path | None, decoder: Path, image_token_id: int) -> tuple[ModelConfig, Template]:
    """Reads the model and template of a run directory. Raises UserError unless it is average-pool SigLIP + Qwen2.5.

    vision: a Hugging Face SigLIP folder, if one was given; decoder: the Qwen2.5 folder (its config.json has the sizes).
    """
    file = run_dir / "config.json"
    with malformed_is_an_error(file):
        return read_run_config(read_json(file), file, vision, decoder, image_token_id)


def read_run_config(
    values: dict[str, Any], file: Path, vision: Path | None, decoder: Path, image_token_id: int
) -> tuple[ModelConfig, Template]:
    if EXTRA_KEY in values:
        extra = values[EXTRA_KEY]
        return from_dict(ModelConfig, extra.get("model"), f"{file}: {EXTRA_KEY}"), extra.get("template", "plain")
    model = values.get("model", {})
    problems = []
    if not str(model.get("arch_specifier", "")).endswith("avgpool"):
        problems.append(f"arch_specifier is {model.get('arch_specifier')!r}, expected one that ends in 'avgpool'")
    if model.get("vision_backbone_id") != PUBLISHED_VISION:
        problems.append(f"vision_backbone_id is {model.get('vision_backbone_id')!r}, expected {PUBLISHED_VISION!r}")
    if model.get("image_resize_strategy", RESIZE) != RESIZE:
        problems.append(f"image_resize_strategy is {model['image_resize_strategy']!r}, expected {RESIZE!r}")
    if problems:
        raise UserError(f"{file}: model: {'; '.join(problems)}.")
    decoder_config = dataclasses.replace(read_decoder_config(decoder), rope_inv_freq="bfloat16")
    sizes = read_vision_config(vision) if vision else published_vision()
    parts = dataclasses.replace(sizes, activation="gelu")
    num_visual_tokens = visual_tokens(model["arch_specifier"])
    config = ModelConfig(parts, decoder_config, num_visual_tokens, image_token_id)
    return config, "plain" if "pretrain" in str(values.get("stage")) else "open_qwen2vl"


def published_vision() -> VisionConfig:
    return ModelConfig.open_qwen2vl_2b().vision


def visual_tokens(arch_specifier: str) -> int:
    """'full-align+729-avgpool' -> 729; 'no-align+avgpool' -> 144."""
    match = re.search(r"(\d+)-avgpool$", arch_specifier)
    return int(match[1]) if match else DEFAULT_VISUAL_TOKENS


def run_config(model: ModelConfig, template: Template) -> dict[str, Any]:
    """Returns config.json of a run directory; the published code loads it if it knows a model of these sizes."""
    pooled = "avgpool" if model.num_visual_tokens == DEFAULT_VISUAL_TOKENS else f"{model.num_visual_tokens}-avgpool"
    is_pretrained = template == "plain"
    return {
        "model": {
            "model_id": "oq2vl-jax",
            "arch_specifier": f"{'no-align' if is_pretrained else 'full-align'}+{pooled}",
            "vision_backbone_id": PUBLISHED_VISION,
            "llm_backbone_id": PUBLISHED_DECODER,
            "image_resize_strategy": RESIZE,
            "llm_max_length": 4096,
        },
        "stage": "pretrain" if is_pretrained else "finetune",
        "mount_path": "Qwen",
        EXTRA_KEY: {"model": dataclasses.asdict(model), "template": template},
    }


def differences_from_published(model: ModelConfig) -> list[str]:
    """Lists what the published code computes differently from this model."""
    published = ModelConfig.open_qwen2vl_2b()
    differences = []
    expected_decoder = dataclasses.replace(published.decoder, rope_inv_freq=model.decoder.rope_inv_freq)
    expected_vision = dataclasses.replace(published.vision, activation=model.vision.activation)
    if (model.vision, model.decoder) != (expected_vision, expected_decoder):
        differences.append("its sizes are not those of the published model, which is the only one that code builds")
    if model.num_visual_tokens not in (DEFAULT_VISUAL_TOKENS, published.vision.num_patches):
        differences.append(f"its {model.num_visual_tokens} visual tokens are neither 144 nor 729")
    if model.vision.activation != "gelu":
        differences.append("its encoder was run with tanh GELU, there it is the exact one")
    if model.decoder.rope_inv_freq != "bfloat16":
        differences.append("its rotary inverse frequencies are float32, there they are rounded to bfloat16")
    return differences
