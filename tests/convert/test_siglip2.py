"""SigLIP2 through the bridge: random towers in its configuration against transformers, and back bit for bit.

A SigLIP2 of a fixed resolution has SigLIP's tower, other weights and another text side, which is not read.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import SiglipConfig, SiglipModel

from convert import from_hf, to_hf
from oq2vl_jax.checkpoint import find_checkpoint
from oq2vl_jax.config import MeshConfig
from oq2vl_jax.errors import UserError
from oq2vl_jax.generate.loading import load_model
from oq2vl_jax.model.siglip import normalize
from oq2vl_jax.sharding import make_mesh
from tests.convert.conftest import randomize
from tests.convert.test_bridge_parity import torch_pixels
from tests.convert.test_round_trips import assert_same, read_folder

TOLERANCE = 2e-5  # of the largest feature; measured 2.2e-7 to 3.6e-7, printed by every test
SHAPES = {  # width, hidden, blocks, heads, image size, patch size
    "as base-patch16": (24, 96, 4, 4, 32, 8),
    "as so400m-patch14: a margin is dropped, the MLP is no multiple": (36, 134, 3, 4, 30, 7),
    "as large-patch16-512": (32, 128, 5, 2, 64, 16),
}
GEMMA = {"model_type": "siglip_text_model", "vocab_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
"""The text side of SigLIP2 takes Gemma's 256,000 tokens; here as many hundreds."""


@pytest.fixture(scope="module", params=SHAPES)
def siglip2(request, tmp_path_factory):
    """(folder of both towers, its torch vision model, side of a picture)."""
    width, hidden, blocks, heads, side, patch = SHAPES[request.param]
    vision = {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": blocks,
              "num_attention_heads": heads, "image_size": side, "patch_size": patch}  # fmt: skip
    text = GEMMA | {"hidden_size": width, "intermediate_size": hidden, "projection_size": width}
    model = randomize(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), seed=21)
    folder = tmp_path_factory.mktemp("siglip2")
    model.save_pretrained(folder)
    return folder, model.vision_model, side


def test_features_equal_transformers(siglip2, qwen, tmp_path):
    folder, theirs, side = siglip2
    patches = (side // theirs.config.patch_size) ** 2
    from_hf.convert(from_hf.FromHFConfig(str(tmp_path / "in"), str(folder), str(qwen[0]), visual_tokens=patches))
    encoder = load_model(find_checkpoint(str(tmp_path / "in")), make_mesh(MeshConfig())).vision
    images = np.random.default_rng(3).integers(0, 256, (3, side, side, 3), np.uint8)
    ours = encoder(normalize(jnp.asarray(images), jnp.float32))
    with torch.no_grad():
        expected = theirs(torch_pixels(images), output_hidden_states=True).hidden_states[-2].numpy()
    error = np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max()
    print(f"SigLIP2 features: relative error {error:.1e}")
    assert error <= TOLERANCE


def test_the_tower_comes_back_bit_for_bit(siglip2, qwen, tmp_path):
    folder, theirs, side = siglip2
    patches = (side // theirs.config.patch_size) ** 2
    from_hf.convert(from_hf.FromHFConfig(str(tmp_path / "in"), str(folder), str(qwen[0]), visual_tokens=patches))
    to_hf.export(to_hf.ToHFConfig(str(tmp_path / "in"), str(tmp_path / "out"), dtype="float32"))
    back = read_folder(tmp_path / "out", from_hf.llava_name)
    there = {f"vision_tower.{name}": value for name, value in read_folder(folder).items() if "vision_model" in name}
    last = f"encoder.layers.{theirs.config.num_hidden_layers - 1}."
    behind = {name for name in there if last in name or "post_layernorm" in name or ".head." in name}
    assert_same(there, {name: back[name] for name in there if name in back}, behind)


def test_siglip2_of_a_fixed_resolution_is_a_siglip(tmp_path):
    """The config.json of google/siglip2-so400m-patch14-384, as far as it says something about the tower."""
    from convert.hf_config import read_vision_config
    from oq2vl_jax.config.backbones import ENCODERS

    tower = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 384,
             "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14}  # fmt: skip
    text = {"model_type": "siglip_text_model", "vocab_size": 256_000, "hidden_size": 1152}
    values = {"model_type": "siglip", "architectures": ["SiglipModel"], "text_config": text, "vision_config": tower}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_vision_config(tmp_path) == ENCODERS["siglip-so400m-patch14-384"]


def test_naflex_is_refused_with_what_would_fit(tmp_path):
    from convert.hf_config import read_vision_config

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2", "vision_config": {}}))
    with pytest.raises(UserError, match=r"NaFlex\) are not here, siglip2-so400m-patch14-384"):
        read_vision_config(tmp_path)
