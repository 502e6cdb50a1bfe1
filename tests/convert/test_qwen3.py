"""Qwen3 through the bridge: random tiny models of several shapes against transformers, and back bit for bit.

Errors are relative to the largest value; what was measured stands beside the tolerance.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from convert import from_hf, to_hf
from oq2vl_jax.checkpoint import find_checkpoint, load_description
from oq2vl_jax.config import DecoderConfig, MeshConfig
from oq2vl_jax.data.loading.batch import IGNORE, Batch
from oq2vl_jax.errors import UserError
from oq2vl_jax.generate.generator import Generator, Request
from oq2vl_jax.generate.loading import load_model
from oq2vl_jax.generate.reply import SamplingOptions
from oq2vl_jax.sharding import make_mesh
from oq2vl_jax.train.gradients import loss_sum
from tests.convert.conftest import IMAGE_TOKEN, NUM_PATCHES, VOCABULARY, randomize, vision_config
from tests.convert.test_bridge_parity import random_row, torch_pixels
from tests.convert.test_round_trips import assert_same, behind_the_features, read_folder

TOLERANCE = 2e-5  # of the largest value; measured 6.2e-7 to 1.4e-6, printed by every test
SHAPES = {  # width, layers, heads, kv heads, head_dim, tied
    "as 0.6B: heads wider than the model": (32, 3, 4, 2, 16, True),
    "as 8B: untied, heads as wide as the model": (48, 2, 6, 2, 8, False),
    "one kv head": (24, 2, 3, 1, 12, True),
}


@pytest.fixture(params=SHAPES, scope="module")
def qwen3_config(request):
    width, layers, heads, kv_heads, head_dim, is_tied = SHAPES[request.param]
    return Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=40, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=is_tied,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
    )  # fmt: skip


def write(model, folder, tokenizer_folder, **options):
    model.save_pretrained(folder, **options)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava3(qwen3_config, tmp_path_factory, byte_tokenizer_folder):
    """(folder, torch model) of transformers' Llava with a Qwen3."""
    config = LlavaConfig(
        vision_config=vision_config("gelu"), text_config=qwen3_config, image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2, vision_feature_select_strategy="full",
        tie_word_embeddings=qwen3_config.tie_word_embeddings,
    )  # fmt: skip
    model = randomize(LlavaForConditionalGeneration(config), seed=11)
    return write(model, tmp_path_factory.mktemp("llava3"), byte_tokenizer_folder), model


@pytest.fixture(scope="module")
def checkpoint(llava3, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("in") / "checkpoint")
    from_hf.convert(from_hf.FromHFConfig(out, model=str(llava3[0]), template="open_qwen2vl"))
    return out


def check_equal(name, ours, theirs):
    theirs = theirs.detach().numpy()
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    print(f"{name}: relative error {error:.1e}")
    assert error <= TOLERANCE


@pytest.mark.parametrize("num_images", [0, 2])
def test_hidden_states_logits_and_loss_equal_transformers(llava3, checkpoint, num_images):
    tokens, images = random_row(num_images, NUM_PATCHES)
    labels = np.where(tokens == IMAGE_TOKEN, IGNORE, tokens)
    pixels = {"pixel_values": torch_pixels(images)} if num_images else {}
    with torch.no_grad():
        theirs = llava3[1](
            input_ids=torch.from_numpy(tokens[None]), labels=torch.from_numpy(labels[None]), output_hidden_states=True,
            **pixels,
        )  # fmt: skip
    model = load_model(find_checkpoint(checkpoint), make_mesh(MeshConfig()))
    ones, positions = jnp.ones((1, len(tokens)), int), jnp.arange(len(tokens))[None]
    hidden = model(jnp.asarray(tokens[None]), jnp.asarray(images[None]), ones, positions)
    check_equal("hidden", hidden[0], theirs.hidden_states[-1][0])
    check_equal("logits", model.logits(hidden)[0], theirs.logits[0])
    next_labels = jnp.asarray(np.append(labels[1:], IGNORE))[None]  # ours are of the next token already
    batch = Batch(**dict.fromkeys(Batch._fields))._replace(
        tokens=jnp.asarray(tokens[None]), images=jnp.asarray(images[None]), segment_ids=ones, positions=positions,
        labels=next_labels,
    )  # fmt: skip
    ours = loss_sum(model, batch) / (next_labels != IGNORE).sum()
    check_equal("loss", ours, theirs.loss)


def test_greedy_replies_have_identical_token_ids(llava3, checkpoint, tmp_path):
    to_hf.export(to_hf.ToHFConfig(checkpoint, str(tmp_path / "out"), dtype="float32", native=True))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(model.model.language_model).__name__ == "Qwen3Model"
    generator = Generator(checkpoint)
    prompt = generator.encode_prompt("what is it?", 0)
    ours = generator.generate([Request(prompt, [])], SamplingOptions(16))[0].tokens
    with torch.no_grad():
        theirs = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=16)[0, len(prompt) :].tolist()
    eos = generator.codec.special.eos
    assert [token for token in theirs if token != eos] == ours


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_sharded", [True, False])
def test_in_and_out_bit_for_bit(llava3, tmp_path, byte_tokenizer_folder, dtype, is_sharded, monkeypatch):
    model = llava3[1].to(getattr(torch, dtype))
    theirs = write(model, tmp_path / "theirs", byte_tokenizer_folder, max_shard_size="20kB" if is_sharded else "1GB")
    llava3[1].float()
    assert (len(list(theirs.glob("*.safetensors"))) > 1) == is_sharded
    if is_sharded:
        monkeypatch.setattr(to_hf, "MAX_SHARD_BYTES", 20_000)
    from_hf.convert(from_hf.FromHFConfig(str(tmp_path / "in"), model=str(theirs)))
    to_hf.export(to_hf.ToHFConfig(str(tmp_path / "in"), str(tmp_path / "out"), dtype=dtype))
    there, back = (read_folder(folder, from_hf.llava_name) for folder in (theirs, tmp_path / "out"))
    assert_same(there, back, behind_the_features("llava"))
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert (text["model_type"], text["head_dim"]) == ("qwen3", llava3[1].config.text_config.head_dim)


def test_the_decoder_alone_beside_a_siglip(siglip, qwen3_config, tmp_path, byte_tokenizer_folder):
    folder = write(randomize(Qwen3ForCausalLM(qwen3_config), seed=12), tmp_path / "qwen3", byte_tokenizer_folder)
    from_hf.convert(from_hf.FromHFConfig(str(tmp_path / "in"), str(siglip[0]), str(folder), visual_tokens=4))
    decoder = load_description(find_checkpoint(str(tmp_path / "in"))).model.decoder
    assert (decoder.kind, decoder.has_qkv_bias, decoder.has_qk_norm) == ("qwen3", False, True)
    to_hf.export(to_hf.ToHFConfig(str(tmp_path / "in"), str(tmp_path / "out"), dtype="float32"))  # pooled
    back = read_folder(tmp_path / "out", from_hf.llava_name)
    there = {f"language_model.{name}": value for name, value in read_folder(folder).items()}
    assert_same(there, {name: back[name] for name in there}, set())


def test_a_decoder_between_the_kinds_has_no_export():
    from convert.export_config import check_has_export
    from oq2vl_jax.config import ModelConfig, VisionConfig

    decoder = DecoderConfig(97, 32, 48, 3, 4, 2, 8, qk_norm=True)
    model = ModelConfig(VisionConfig(30, 7, 24, 40, 4, 3), decoder, 4, 5)
    with pytest.raises(UserError, match=r"qkv_bias = True and qk_norm = True are neither Qwen2's"):
        check_has_export(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias is true"),
        ({"model_type": "qwen3_moe"}, "expected 'qwen2' or 'qwen3'; mixtures of experts are not here"),
        ({"model_type": "llama"}, "model_type is 'llama', expected 'qwen2' or 'qwen3'"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
    ],
)
def test_another_family_is_refused_by_name(siglip, qwen, tmp_path, change, message):
    from convert.hf_config import read_decoder_config

    values = json.loads((qwen[0] / "config.json").read_text()) | {"model_type": "qwen3"} | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        read_decoder_config(tmp_path)
