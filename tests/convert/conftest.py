"""Tiny random models of other people's making, written to disk by their own libraries."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
)

from tests.convert.published_forward import PublishedVision

WIDTH, BLOCKS, HEADS, HIDDEN, IMAGE_SIZE, PATCH = 24, 4, 3, 40, 30, 7  # 30 = 4 * 7 + 2: a margin is dropped
NUM_PATCHES = 16
VOCABULARY, DECODER_WIDTH = 320, 32  # the byte tokenizer has 280 entries
IMAGE_TOKEN = 268


def randomize(model, seed):
    """A random value for every parameter, norms and biases too, so that no mistake multiplies by one or adds zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 else 0.0))
    return model.eval()


def vision_config(activation="gelu_pytorch_tanh"):
    return SiglipVisionConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=BLOCKS, num_attention_heads=HEADS,
        image_size=IMAGE_SIZE, patch_size=PATCH, hidden_act=activation,
    )  # fmt: skip


def text_config(is_tied=True):
    return Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=DECODER_WIDTH, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        tie_word_embeddings=is_tied,
    )  # fmt: skip


def write_decoder(folder, tokenizer_folder, is_tied=True):
    """A Qwen2 with its tokenizer; returns the torch model."""
    model = randomize(Qwen2ForCausalLM(text_config(is_tied)), seed=2)
    model.save_pretrained(folder, max_shard_size="20kB")  # several shards and an index
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def siglip(tmp_path_factory):
    """(folder of the two-tower model, its torch vision model)."""
    folder = tmp_path_factory.mktemp("siglip")
    text = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": 50}  # fmt: skip
    model = randomize(SiglipModel(SiglipConfig(text_config=text, vision_config=vision_config().to_dict())), seed=1)
    model.save_pretrained(folder)
    return folder, model.vision_model


@pytest.fixture(scope="session")
def qwen(tmp_path_factory, byte_tokenizer_folder):
    """(folder, torch model) of a tied Qwen2."""
    folder = tmp_path_factory.mktemp("qwen2")
    return folder, write_decoder(folder, byte_tokenizer_folder)


@pytest.fixture(scope="session")
def llava(tmp_path_factory, byte_tokenizer_folder):
    """(folder, torch model) of transformers' Llava with our parts and a head of its own."""
    folder = tmp_path_factory.mktemp("llava")
    config = LlavaConfig(
        vision_config=vision_config("gelu"), text_config=text_config(is_tied=False), image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2, vision_feature_select_strategy="full",
    )  # fmt: skip
    model = randomize(LlavaForConditionalGeneration(config), seed=3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(byte_tokenizer_folder).save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="session")
def published_parts():
    """(timm-named vision encoder, projector, decoder) as the published code holds them."""
    vision = randomize(PublishedVision(WIDTH, HIDDEN, BLOCKS, HEADS, PATCH, NUM_PATCHES), seed=4)
    projector = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, DECODER_WIDTH), torch.nn.GELU(), torch.nn.Linear(DECODER_WIDTH, DECODER_WIDTH)
    )
    return vision, randomize(projector, seed=5), randomize(Qwen2ForCausalLM(text_config()), seed=6)


def photo(path, seed, size=(45, 31)):
    """A smooth picture of no particular shape, as a JPEG or PNG by its suffix."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    small.resize(size, Image.Resampling.BICUBIC).save(path)
    return str(path)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Four pictures: larger and smaller than the model's, wide and tall, JPEG and PNG."""
    folder = tmp_path_factory.mktemp("photos")
    sizes = ((45, 31), (20, 60), (30, 30), (301, 200))
    return [photo(folder / f"{i}.{'png' if i % 2 else 'jpg'}", i, size) for i, size in enumerate(sizes)]


@pytest.fixture
def parts(siglip, qwen, tmp_path):
    """Copies of the two folders, to be damaged."""
    folders = tmp_path / "vision", tmp_path / "decoder"
    for source, folder in zip((siglip[0], qwen[0]), folders, strict=True):
        shutil.copytree(source, folder)
    return folders
