"""A run with adapters leaves as a merged model, and as an adapter that PEFT loads on the export of its base."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from convert import from_hf, to_hf
from convert.checkpoint_stream import CheckpointReader
from oq2vl_jax.checkpoint import find_checkpoint, load_description
from oq2vl_jax.config import LoraConfig
from oq2vl_jax.config_files import load_config
from oq2vl_jax.errors import UserError
from oq2vl_jax.train.run import run
from oq2vl_jax.weights import load_adapters
from tests.convert.test_bridge_parity import random_row, torch_pixels

TOLERANCE = 2e-5  # of the largest logit; measured 4.1e-7
SCALE = 2.0


@pytest.fixture(scope="module")
def tuned(llava, tmp_path_factory):
    """(base checkpoint, run directory) of two steps of adapters of every part, at a rate that changes the logits."""
    folder = tmp_path_factory.mktemp("tuned")
    base = str(folder / "base")
    from_hf.convert(from_hf.FromHFConfig(base, model=str(llava[0]), template="plain"))
    tiny, model = load_config("configs/tiny.py"), load_description(find_checkpoint(base)).model
    config = dataclasses.replace(
        tiny, model=model, init_from=base, run_dir=str(folder / "run"), num_steps=2,
        lora=LoraConfig(rank=4, alpha=4 * SCALE, targets=("vision", "projector", "decoder")),
        optimizer=dataclasses.replace(tiny.optimizer, learning_rate=0.05),
    )  # fmt: skip
    run(config)
    return base, config.run_dir


def test_a_merged_export_is_the_merge_by_hand_to_the_bit(tuned):
    base, run_dir = (CheckpointReader(find_checkpoint(folder)) for folder in tuned)
    adapters = load_adapters(find_checkpoint(tuned[1]))
    assert len(adapters) == 6 + 2 + 7
    for name in base.shapes:
        expected = base.read(name)
        if name in adapters:
            adapter = adapters[name]
            layers = range(len(expected)) if expected.ndim > 2 else [...]
            for i in layers:
                expected[i] = expected[i] + np.float32(SCALE) * (adapter.a[i] @ adapter.b[i])
        assert np.array_equal(run_dir.read(name), expected), name


def logits_of(model, num_visual_tokens):
    tokens, images = random_row(2, num_visual_tokens, length=20)
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens[None]), pixel_values=torch_pixels(images)).logits[0].numpy()


def test_peft_on_the_export_of_the_base_equals_the_merged_export(tuned, tmp_path):
    for name, checkpoint, options in (
        ("base", tuned[0], {}),
        ("merged", tuned[1], {}),
        ("adapter", tuned[1], {"adapter_only": True}),
    ):
        to_hf.export(to_hf.ToHFConfig(checkpoint, str(tmp_path / name), dtype="float32", **options))

    def load(name):
        return AutoModelForImageTextToText.from_pretrained(tmp_path / name, dtype=torch.float32).eval()

    num_visual_tokens = load_description(find_checkpoint(tuned[0])).model.num_visual_tokens
    plain, merged = (logits_of(load(name), num_visual_tokens) for name in ("base", "merged"))
    adapted = PeftModel.from_pretrained(load("base"), str(tmp_path / "adapter")).eval()
    found = {name for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert len(found) == len(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"])
    error = np.abs(logits_of(adapted, num_visual_tokens) - merged).max() / np.abs(merged).max()
    change = np.abs(plain - merged).max() / np.abs(merged).max()
    print(f"PEFT: relative error {error:.1e}; the adapters change the logits by {change:.1e}")
    assert error < TOLERANCE
    assert change > 100 * TOLERANCE


def test_an_adapter_whose_base_asks_otherwise_is_refused(tuned, tmp_path):
    file = find_checkpoint(str(shutil.copytree(tuned[1], tmp_path / "run"))) / "config" / "metadata"
    file.write_text(file.read_text().replace('"template": "plain"', '"template": "chatml"'))
    shutil.rmtree(file.parent.parent / "digests")
    with pytest.raises(UserError, match=r"would ask otherwise .*template chatml, there plain.*adapters are merged"):
        to_hf.export(to_hf.ToHFConfig(str(tmp_path / "run"), str(tmp_path / "no"), adapter_only=True))
    assert not (tmp_path / "no").exists()


def test_an_adapter_of_a_whole_model_is_refused(tuned, tmp_path):
    with pytest.raises(UserError, match="holds a whole model; leave out the flag"):
        to_hf.export(to_hf.ToHFConfig(tuned[0], str(tmp_path / "no"), adapter_only=True))
    assert not list(tmp_path.iterdir())
