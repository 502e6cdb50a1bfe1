"""Exports of each kind of projector: logits as in transformers, and the same weights when they come back."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from convert import from_hf, to_hf, to_prismatic
from convert.checkpoint_stream import LazyArray, save_checkpoint
from oq2vl_jax.checkpoint import find_checkpoint, load_description
from oq2vl_jax.config import (
    CheckpointDescription,
    DecoderConfig,
    MeshConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
)
from oq2vl_jax.errors import UserError
from oq2vl_jax.generate.loading import load_model
from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
from oq2vl_jax.sharding import make_mesh
from oq2vl_jax.trees import named_arrays

TOLERANCE = 2e-5  # of the largest logit; measured 5e-7
KINDS = {"avg_pool_linear": 9, "avg_pool_mlp": 9, "pixel_shuffle_mlp": 16}
"""Visual tokens of a grid of 7 x 7 patches; squares of 2 do not divide it."""


def write_checkpoint(folder, kind, tokenizer):
    model = ModelConfig(
        vision=VisionConfig(56, 8, hidden_size=16, intermediate_size=32, num_layers=3, num_heads=2),
        decoder=DecoderConfig(320, 32, 64, 2, 4, 2, 8, rope_theta=1e4),
        num_visual_tokens=KINDS[kind],
        image_token_id=268,
        projector=ProjectorConfig(kind),
    )
    arrays = {name: np.array(x) for name, x in named_arrays(OpenQwen2VL(jax.random.key(3), model)).items()}
    rng = np.random.default_rng(0)
    arrays |= {name: x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for name, x in arrays.items()}
    lazy = {name: LazyArray(x.shape, lambda x=x: x) for name, x in arrays.items()}
    save_checkpoint(folder, lazy, CheckpointDescription(model, "chatml", "random"), Path(tokenizer))
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_of_each_kind_has_the_logits_of_the_checkpoint_and_comes_back(kind, byte_tokenizer_folder, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "in", kind, byte_tokenizer_folder)
    to_hf.export(to_hf.ToHFConfig(checkpoint, str(tmp_path / "out"), dtype="float32"))
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32, trust_remote_code=True)
    ours = load_model(find_checkpoint(checkpoint), make_mesh(MeshConfig()))
    rng = np.random.default_rng(1)
    tokens = np.concatenate([rng.integers(0, 256, 5), np.full(KINDS[kind], 268), rng.integers(0, 256, 9)])[None]
    image = rng.integers(0, 256, (1, 1, 56, 56, 3), np.uint8)
    hidden = ours(*map(jnp.asarray, (tokens, image, np.ones_like(tokens), np.arange(tokens.size)[None])))
    pixels = torch.from_numpy(image[0].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=torch.from_numpy(tokens), pixel_values=pixels).logits.numpy()
    error = np.abs(np.asarray(ours.logits(hidden)) - expected).max() / np.abs(expected).max()
    print(f"{kind}: relative error {error:.1e}")
    assert error <= TOLERANCE
    from_hf.convert(from_hf.FromHFConfig(str(tmp_path / "back"), model=str(tmp_path / "out")))
    back = load_model(find_checkpoint(str(tmp_path / "back")), make_mesh(MeshConfig()))
    for name, array in named_arrays(ours).items():
        np.testing.assert_array_equal(array, named_arrays(back)[name])
    descriptions = [load_description(find_checkpoint(folder)) for folder in (checkpoint, str(tmp_path / "back"))]
    assert descriptions[0].model == descriptions[1].model


def test_the_published_layout_has_one_kind_of_projector(byte_tokenizer_folder, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "in", "pixel_shuffle_mlp", byte_tokenizer_folder)
    with pytest.raises(UserError, match="the published code has no projector but avg_pool_mlp"):
        to_prismatic.export(to_prismatic.ToPrismaticConfig(checkpoint, str(tmp_path / "out")))
    with pytest.raises(UserError, match=r"--native: this model is not .*: its projector is pixel_shuffle_mlp"):
        to_hf.export(to_hf.ToHFConfig(checkpoint, str(tmp_path / "out"), native=True))
