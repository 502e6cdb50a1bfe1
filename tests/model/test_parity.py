"""Every part against transformers / torch with random tiny weights in float32; no download."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from oq2vl_jax.config import DecoderConfig, VisionConfig
from oq2vl_jax.model.layers import gelu
from oq2vl_jax.model.projector import adaptive_average_pool
from oq2vl_jax.model.qwen2 import Qwen2Decoder
from oq2vl_jax.model.siglip import SiglipEncoder

VISION_TOLERANCE = 5e-6  # of the largest feature; measured 1.5e-7
DECODER_TOLERANCE = 5e-6  # of the largest logit; measured 3.3e-7 and 3.7e-7
BFLOAT16_ROUNDING = 2**-8  # relative; measured 2**-8.04, and 2**-7.3 when every step is rounded
POOL_TOLERANCE = 1e-6  # of the largest value; measured 1.2e-7


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_in_bfloat16_is_rounded_once(approximate):
    x = jnp.asarray(3 * np.random.default_rng().normal(size=100_000), jnp.bfloat16)
    exact = torch.nn.functional.gelu(torch.from_numpy(np.asarray(x, np.float64)), approximate=approximate).numpy()
    is_normal = np.abs(exact) > 1e-2
    errors = (
        np.abs(np.asarray(gelu(x, approximate == "tanh"), np.float64) - exact)[is_normal] / np.abs(exact)[is_normal]
    )
    assert errors.max() <= BFLOAT16_ROUNDING * 1.01


def relative_error(ours, theirs) -> float:
    theirs = theirs.detach().numpy()
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def set_linear(linear, weight, bias=None):
    """A torch [out, in] weight into one of our layers."""
    linear.kernel = linear.kernel.replace(jnp.asarray(weight.T))
    if bias is not None:
        linear.bias = linear.bias.replace(jnp.asarray(bias))


def set_norm(norm, state, name):
    norm.scale = norm.scale.replace(jnp.asarray(state[f"{name}.weight"]))
    if f"{name}.bias" in state:
        norm.bias = norm.bias.replace(jnp.asarray(state[f"{name}.bias"]))


def randomized_state(torch_model, seed):
    """Gives every parameter a random value (norms and biases too) and returns them as numpy."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in torch_model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 else 0.0))
    return {name: value.detach().numpy().copy() for name, value in torch_model.state_dict().items()}


def load_stacked(stacked, states, fill):
    """Fills one unstacked layer per state and stacks them into `stacked`."""
    layers = []
    for i, state in enumerate(states):
        layer = jax.tree.map(lambda x, i=i: x[i], stacked)
        fill(layer, state)
        layers.append(layer)
    return jax.tree.map(lambda *xs: jnp.stack(xs), *layers)


def with_prefix(state, prefix):
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


@pytest.mark.parametrize(("ours", "theirs"), [("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")])
def test_vision_features_equal_hidden_states_minus_two_of_siglip(ours, theirs):
    config = VisionConfig(30, 7, 24, 40, 4, 3, activation=ours)  # 30 = 4 * 7 + 2: a margin is dropped
    torch_model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=3, image_size=30,
            patch_size=7, hidden_act=theirs, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    state = randomized_state(torch_model, seed=1)
    state = {key.removeprefix("vision_model."): value for key, value in state.items()}
    encoder = SiglipEncoder(jax.random.key(0), config)
    kernel = state["embeddings.patch_embedding.weight"].transpose(0, 2, 3, 1).reshape(24, -1)
    set_linear(encoder.patch_embedding, kernel, state["embeddings.patch_embedding.bias"])
    encoder.position_embedding = encoder.position_embedding.replace(
        jnp.asarray(state["embeddings.position_embedding.weight"])
    )

    def fill(layer, layer_state):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            prefix = f"self_attn.{name}"
            set_linear(getattr(layer.self_attn, name), layer_state[f"{prefix}.weight"], layer_state[f"{prefix}.bias"])
        for name in ("fc1", "fc2"):
            set_linear(getattr(layer.mlp, name), layer_state[f"mlp.{name}.weight"], layer_state[f"mlp.{name}.bias"])
        for name in ("layer_norm1", "layer_norm2"):
            set_norm(getattr(layer, name), layer_state, name)

    encoder.layers = load_stacked(encoder.layers, [with_prefix(state, f"encoder.layers.{i}.") for i in range(3)], fill)
    pixels = np.random.default_rng(2).normal(size=(2, 30, 30, 3)).astype(np.float32)
    with torch.no_grad():
        expected = torch_model(torch.from_numpy(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    error = relative_error(encoder(jnp.asarray(pixels)), expected.hidden_states[-2])
    print(f"vision, {ours}: relative error {error:.1e}")
    assert error < VISION_TOLERANCE


@pytest.mark.parametrize("is_tied", [True, False])
def test_decoder_logits_equal_qwen2(is_tied):
    config = DecoderConfig(97, 32, 48, 3, 4, 2, 8, rope_theta=1e6, tie_word_embeddings=is_tied)
    torch_model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
            tie_word_embeddings=is_tied, rms_norm_eps=1e-6, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    state = randomized_state(torch_model, seed=3)
    decoder = Qwen2Decoder(jax.random.key(0), config)
    decoder.embed_tokens = decoder.embed_tokens.replace(jnp.asarray(state["model.embed_tokens.weight"]))
    if not is_tied:
        decoder.lm_head = decoder.lm_head.replace(jnp.asarray(state["lm_head.weight"]))
    set_norm(decoder.norm, state, "model.norm")

    def fill(layer, layer_state):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            prefix = f"self_attn.{name}"
            set_linear(
                getattr(layer.self_attn, name), layer_state[f"{prefix}.weight"], layer_state.get(f"{prefix}.bias")
            )
        for name in ("gate_proj", "up_proj", "down_proj"):
            set_linear(getattr(layer.mlp, name), layer_state[f"mlp.{name}.weight"])
        for name in ("input_layernorm", "post_attention_layernorm"):
            set_norm(getattr(layer, name), layer_state, name)

    decoder.layers = load_stacked(decoder.layers, [with_prefix(state, f"model.layers.{i}.") for i in range(3)], fill)
    tokens = np.random.default_rng(4).integers(0, 97, (2, 40))
    positions = np.broadcast_to(np.arange(40), tokens.shape)
    hidden = decoder(decoder.embed(jnp.asarray(tokens), jnp.float32), jnp.ones_like(tokens), jnp.asarray(positions))
    with torch.no_grad():
        expected = torch_model(torch.from_numpy(tokens)).logits
    error = relative_error(hidden @ decoder.head.T, expected)
    print(f"decoder, tied {is_tied}: relative error {error:.1e}")
    assert error < DECODER_TOLERANCE


@pytest.mark.parametrize(("side", "bins"), [(27, 12), (27, 27), (27, 5), (8, 4), (7, 3), (5, 1)])
def test_pooling_equals_torch_adaptive_average_pool(side, bins):
    features = np.random.default_rng(side).normal(size=(2, side * side, 6)).astype(np.float32)
    grid = torch.from_numpy(features).reshape(2, side, side, 6).permute(0, 3, 1, 2)
    expected = torch.nn.functional.adaptive_avg_pool2d(grid, (bins, bins)).permute(0, 2, 3, 1).reshape(2, -1, 6)
    pooled = adaptive_average_pool(jnp.asarray(features), bins * bins)
    assert relative_error(pooled, expected) < POOL_TOLERANCE
    if side == bins:
        assert np.array_equal(pooled, features)
