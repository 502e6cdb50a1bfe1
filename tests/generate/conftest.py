"""A checkpoint that says many different things: random weights, wide enough to have no favourite token."""

import jax
import numpy as np
import pytest

from convert.checkpoint_stream import LazyArray, save_checkpoint
from oq2vl_jax.config import CheckpointDescription, DecoderConfig, ModelConfig, VisionConfig
from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
from oq2vl_jax.trees import named_arrays

MODEL = ModelConfig(
    vision=VisionConfig(image_size=32, patch_size=8, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2),
    decoder=DecoderConfig(320, 32, 64, 2, 4, 2, 8, rope_theta=1e4),
    num_visual_tokens=4,
    image_token_id=268,
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, byte_tokenizer_folder):
    from pathlib import Path

    model = OpenQwen2VL(jax.random.key(3), MODEL)
    arrays = {name: np.array(x) for name, x in named_arrays(model).items()}
    arrays["decoder.layers.mlp.down_proj.kernel"] *= 30  # or a token would only repeat itself
    lazy = {name: LazyArray(x.shape, lambda x=x: x) for name, x in arrays.items()}
    folder = tmp_path_factory.mktemp("random") / "checkpoint"
    description = CheckpointDescription(MODEL, "chatml", "random")
    save_checkpoint(folder, lazy, description, Path(byte_tokenizer_folder))
    return str(folder)
