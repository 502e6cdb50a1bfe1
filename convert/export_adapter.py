"""Writes the adapters of a run as PEFT reads them, for the export of the checkpoint that the run started from.

    adapter_config.json           rank, alpha, the modules with adapters (by full name)
    adapter_model.safetensors     base_model.model.MODULE.lora_A.weight [rank, in], .lora_B.weight [out, rank], float32

MODULE is a module of transformers' LlavaForConditionalGeneration since 5.0, by the weight table; transformers 4 has the
same names for decoder and projector.
"""

import json
from pathlib import Path

import numpy as np

from oq2vl_jax.checkpoint import load_description, load_train_config
from oq2vl_jax.config import Weights
from oq2vl_jax.errors import UserError
from oq2vl_jax.weights import Adapter, find_base, load_adapters, recorded_base

from .weight_map import LAYOUTS


def write_adapter(folder: Path, checkpoint: Path, weights: Weights) -> str:
    """Writes the files of a checkpoint of adapters; returns a line about them. Raises UserError for another one."""
    from safetensors.numpy import save_file

    if recorded_base(checkpoint) is None:
        raise UserError(f"--adapter-only: {checkpoint} holds a whole model; leave out the flag.")
    base, adapters = find_base(checkpoint), load_adapters(checkpoint, weights)
    check_same_export(checkpoint, base)
    modules = {module: one for name, adapter in adapters.items() for module, one in of_modules(name, adapter)}
    tensors = {}
    for module, one in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(one.a.T)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(one.b.T)
    training = load_train_config(checkpoint)
    assert training is not None
    rank = training.lora.rank
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": training.lora.alpha, "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "target_modules": sorted(modules),
        "base_model_name_or_path": f"{base.parent.parent.name}@{int(base.name)}",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return f"{len(modules)} modules of rank {rank} for the export of {base}: PeftModel.from_pretrained(model, FOLDER)"


def check_same_export(checkpoint: Path, base: Path) -> None:
    """Raises UserError if the export of the base would prepare pictures or prompts otherwise than the run did."""
    ours, theirs = load_description(checkpoint), load_description(base)
    pairs = {
        "visual tokens": (ours.model.num_visual_tokens, theirs.model.num_visual_tokens),
        "template": (ours.template, theirs.template),
    }
    differing = [f"{name} {a}, there {b}" for name, (a, b) in pairs.items() if a != b]
    if differing:
        raise UserError(
            f"--adapter-only: the export of {base} would ask otherwise than this run was trained "
            f"({'; '.join(differing)}). Leave out the flag, and the adapters are merged."
        )


def of_modules(kernel: str, adapter: Adapter) -> list[tuple[str, Adapter]]:
    """Returns (module of transformers, its adapter) of every layer of one of our kernels."""
    row = next(row for row in LAYOUTS["open_qwen2vl"] if row.ours == (kernel,))
    module = row.theirs.removesuffix(".weight")
    if "{layer}" not in module:
        return [(module, adapter)]
    layers = enumerate(zip(adapter.a, adapter.b, strict=True))
    return [(module.format(layer=i), Adapter(a, b, adapter.scale)) for i, (a, b) in layers]
