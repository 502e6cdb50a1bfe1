"""Sizes of published backbones and of the ladder, against the numbers of parameters that their publishers give."""

import dataclasses
import math

import jax
import pytest

from oq2vl_jax.bench import fits
from oq2vl_jax.config import ModelConfig
from oq2vl_jax.config.backbones import DECODERS, ENCODERS
from oq2vl_jax.config.ladder import ladder_model, num_parameters
from oq2vl_jax.config_files import load_config
from oq2vl_jax.errors import UserError
from oq2vl_jax.model.qwen2 import Qwen2Decoder
from oq2vl_jax.model.siglip import SiglipEncoder
from oq2vl_jax.trees import named_arrays

PUBLISHED = {  # billions, of their model cards and safetensors files
    "Qwen2.5-0.5B": 0.494, "Qwen2.5-1.5B": 1.544, "Qwen2.5-3B": 3.086, "Qwen2.5-7B": 7.616,
    "Qwen3-0.6B": 0.596, "Qwen3-1.7B": 1.721, "Qwen3-4B": 4.022, "Qwen3-8B": 8.191,
}  # fmt: skip


def size_of(make, config):
    shapes = jax.eval_shape(lambda: make(jax.random.key(0), config))
    return sum(math.prod(x.shape) for x in named_arrays(shapes).values())


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_has_as_many_parameters_as_published(name):
    assert round(size_of(Qwen2Decoder, DECODERS[name]) / 1e9, 3) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "number"), [("siglip-base-patch16-224", 92_884_224), ("siglip-so400m-patch14-384", 428_225_600)]
)
def test_an_encoder_has_as_many_parameters_as_published(name, number):
    """With the last block, the final norm and the pooling head, which are not built here."""
    config = ENCODERS[name]
    width, hidden = config.hidden_size, config.intermediate_size
    attention, mlp, norm = 4 * width * (width + 1), 2 * width * hidden + hidden + width, 2 * width
    block, pooling = attention + mlp + 2 * norm, width + attention + norm + mlp
    assert size_of(SiglipEncoder, config) + block + norm + pooling == number


@pytest.mark.parametrize("size", ["xs", "s", "m", "l"])
def test_a_size_of_the_ladder(size):
    config = load_config(f"ladder/{size}")
    assert config.model.decoder.intermediate_size % 16 == config.model.vision.intermediate_size % 16 == 0
    work = config.num_steps * config.global_batch_size * config.data.num_tokens
    assert abs(work / (20 * num_parameters(config.model)) - 1) < 1e-3
    assert config.trainable.parts == ("vision", "projector", "decoder")


def test_the_largest_size_is_the_published_model():
    assert load_config("ladder/l").model == ModelConfig.open_qwen2vl_2b()


def test_a_width_off_the_ladder_is_refused():
    with pytest.raises(UserError, match="give a multiple of 128"):
        ladder_model(200, 4)


def test_what_a_kind_says_and_what_is_spelled_out_are_the_same_model():
    model = load_config("tiny").model
    explicit = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, qkv_bias=True, qk_norm=False))
    assert explicit != model
    assert explicit.spelled_out() == model.spelled_out()


def test_decoders_of_a_table_and_changes_to_the_decoder_exclude_each_other():
    options = fits.Fits(("tiny",), ("Qwen3-0.6B",), changes=("model.decoder.num_layers=2",))
    with pytest.raises(UserError, match=r"--changes model.decoder.num_layers=2 would be lost"):
        fits.measure(options)
