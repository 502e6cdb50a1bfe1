"""The assembled model: published sizes, visual tokens in their places, packed rows against single documents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oq2vl_jax.config import DecoderConfig, ModelConfig, VisionConfig
from oq2vl_jax.model.attention import causal_segment_mask
from oq2vl_jax.model.layers import Compute
from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL, flat_images, merge_visual_tokens
from oq2vl_jax.model.qwen2 import Qwen2Decoder, rope_table
from oq2vl_jax.trees import named_arrays

ALONE_TOLERANCE = 2e-5  # of the largest hidden value; measured 0 on this CPU
REMAT_TOLERANCE = 1e-5  # of a parameter's largest gradient; measured 1.5e-6
IMAGE = 60
CONFIG = ModelConfig(
    vision=VisionConfig(image_size=16, patch_size=4, hidden_size=16, intermediate_size=32, num_layers=3, num_heads=2),
    decoder=DecoderConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
    ),
    num_visual_tokens=4,
    image_token_id=IMAGE,
)


@pytest.fixture(scope="module")
def model():
    return OpenQwen2VL(jax.random.key(0), CONFIG)


def make_row(rng, lengths, num_images):
    """tokens, images, segment_ids, positions of one row; every document begins with as many images as it has."""
    tokens, segments, positions = [], [], []
    for i, (length, count) in enumerate(zip(lengths, num_images, strict=True)):
        document = np.concatenate([np.full(4 * count, IMAGE), rng.integers(0, IMAGE, length)])
        tokens.append(document)
        segments.append(np.full(len(document), i + 1))
        positions.append(np.arange(len(document)))
    images = rng.integers(0, 256, (sum(num_images), 16, 16, 3), dtype=np.uint8)
    return np.concatenate(tokens), images, np.concatenate(segments), np.concatenate(positions)


def run(model, tokens, images, segments, positions):
    return np.asarray(model(*(jnp.asarray(x[None]) for x in (tokens, images, segments, positions))))[0]


def test_published_model_has_the_published_sizes():
    shapes = jax.eval_shape(lambda key: OpenQwen2VL(key, ModelConfig.open_qwen2vl_2b()), jax.random.key(0))
    counts = {
        part: sum(x.size for x in jax.tree.leaves(getattr(shapes, part))) for part in ("vision", "projector", "decoder")
    }
    block = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    assert counts["vision"] == 26 * block + (14 * 14 * 3 + 1) * 1152 + 729 * 1152
    assert counts["projector"] == (1152 + 1) * 1536 + (1536 + 1) * 1536
    assert counts["decoder"] == 1_543_714_304, "Qwen2.5-1.5B as its model card counts it, the tied head once"


def test_packed_row_equals_its_documents_one_by_one(model):
    rng = np.random.default_rng(1)
    tokens, images, segments, positions = make_row(rng, [5, 9, 3], [1, 0, 2])
    packed = run(model, tokens, images, segments, positions)
    first_image, worst = 0, 0.0
    for document in (1, 2, 3):
        chosen = segments == document
        count = int((tokens[chosen] == IMAGE).sum()) // 4
        own_images = images[first_image : first_image + count]
        alone = run(model, tokens[chosen], own_images, np.ones(chosen.sum(), int), positions[chosen])
        worst = max(worst, float(np.abs(alone - packed[chosen]).max()))
        first_image += count
    print(f"packed against alone: {worst / np.abs(packed).max():.1e}")
    assert worst < ALONE_TOLERANCE * np.abs(packed).max()


def test_packed_documents_do_not_see_each_other(model):
    rng = np.random.default_rng(2)
    tokens, images, segments, positions = make_row(rng, [6, 7], [1, 1])
    before = run(model, tokens, images, segments, positions)
    changed_tokens, changed_images = tokens.copy(), images.copy()
    is_text = (segments == 1) & (tokens != IMAGE)
    changed_tokens[is_text] = (tokens[is_text] + 1) % IMAGE
    changed_images[0] = 255 - images[0]
    after = run(model, changed_tokens, changed_images, segments, positions)
    assert np.array_equal(before[segments == 2], after[segments == 2])
    assert not np.allclose(before[segments == 1], after[segments == 1])


def test_the_gradient_of_one_document_does_not_reach_another(model):
    rng = np.random.default_rng(3)
    tokens, images, segments, positions = (jnp.asarray(x[None]) for x in make_row(rng, [6, 7], [1, 1]))

    def second_document_loss(x):
        hidden = model.decoder(x, segments, positions)
        return jnp.where((segments == 2)[..., None], hidden**2, 0).sum()

    gradient = jax.grad(second_document_loss)(model.embed(tokens, images))
    assert (gradient[segments == 1] == 0).all()
    assert (jnp.abs(gradient[segments == 2]).sum(-1) > 0).all()


def test_row_scope_lets_documents_see_each_other(model):
    rng = np.random.default_rng(4)
    tokens, images, segments, _ = make_row(rng, [6, 7], [1, 1])
    one, run_through = np.ones_like(segments), np.arange(len(segments))
    before = run(model, tokens, images, one, run_through)
    changed = tokens.copy()
    changed[5] = (tokens[5] + 1) % IMAGE
    after = run(model, changed, images, one, run_through)
    assert not np.allclose(before[segments == 2], after[segments == 2])


def test_nth_placeholder_takes_the_nth_visual_token():
    embeddings = jnp.zeros((2, 6, 1))
    visual = jnp.arange(1.0, 9.0).reshape(4, 2, 1)
    is_image = jnp.array([[0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0]], bool)
    merged = merge_visual_tokens(embeddings, visual, is_image)[:, :, 0]
    assert merged.tolist() == [[0, 1, 2, 0, 3, 4], [5, 6, 0, 0, 0, 0]]


def test_flat_images_has_the_images_of_all_rows_first():
    images = jnp.arange(8, dtype=jnp.uint8).reshape(2, 4, 1, 1, 1) * jnp.ones((1, 1, 1, 1, 3), jnp.uint8)
    buffer, count = flat_images(images, jnp.array([2, 3]))
    assert buffer[:, 0, 0, 0].tolist() == [0, 1, 4, 5, 6, 2, 3, 7]
    assert count == 5


def test_mask_is_the_one_drawn_in_attention():
    segments, positions = jnp.array([[1, 1, 1, 2, 2, 0]]), jnp.array([[0, 1, 2, 0, 1, 0]])
    mask = causal_segment_mask(segments, positions, segments, positions)[0].astype(int)
    assert mask[:5].tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
    ]


def test_rope_angles_against_the_formula_in_double_precision():
    config = dataclasses.replace(CONFIG.decoder, head_dim=128)
    positions = np.array([[0, 1, 100, 4095]])
    cos, sin = rope_table(jnp.asarray(positions), config)
    angles = positions[..., None] * 1e6 ** (-np.arange(0, 128, 2) / 128)
    # float32 angles of up to 4,095 rad carry an error of up to 2.4e-4 rad; measured 2.4e-4
    assert np.abs(cos - np.cos(angles)).max() < 5e-4
    assert np.abs(sin - np.sin(angles)).max() < 5e-4


def test_bfloat16_inverse_frequencies_are_the_rounded_ones():
    config = dataclasses.replace(CONFIG.decoder, head_dim=128, rope_inv_freq="bfloat16")
    rounded = jnp.asarray(1e6 ** (-np.arange(0, 128, 2) / 128), jnp.bfloat16).astype(jnp.float32)
    cos, _ = rope_table(jnp.array([[3]]), config)
    assert np.allclose(cos[0, 0], np.cos(3 * rounded), atol=1e-6)


def test_remat_changes_nothing(model):
    rng = np.random.default_rng(5)
    tokens, images, segments, positions = (jnp.asarray(x[None]) for x in make_row(rng, [6, 7], [1, 1]))

    weights = rng.normal(size=(*tokens.shape, CONFIG.decoder.hidden_size))  # the norm makes a plain square constant

    def loss(model, remat):
        return (weights * model(tokens, images, segments, positions, Compute(remat=remat))).sum()

    gradient_of = jax.jit(jax.grad(loss), static_argnums=1)
    plain = named_arrays(gradient_of(model, "none"))
    plain.pop("vision.layers.self_attn.k_proj.bias")  # softmax does not depend on it: its gradient is rounding alone
    for remat in ("dots", "attention", "full"):
        gradient = named_arrays(gradient_of(model, remat))
        errors = {name: jnp.abs(gradient[name] - x).max() / jnp.abs(x).max() for name, x in plain.items()}
        print(remat, max(errors.values()))
        assert max(errors.values()) < REMAT_TOLERANCE


def test_a_wrong_shape_is_named(model):
    with pytest.raises(Exception, match="segment_ids"):
        model(
            jnp.zeros((1, 8), int),
            jnp.zeros((1, 0, 16, 16, 3), jnp.uint8),
            jnp.ones((1, 7), int),
            jnp.zeros((1, 8), int),
        )


def test_untied_decoder_has_its_own_head():
    decoder = Qwen2Decoder(jax.random.key(0), dataclasses.replace(CONFIG.decoder, tie_word_embeddings=False))
    assert decoder.head is not decoder.embed_tokens[...]
    assert not np.array_equal(decoder.head, decoder.embed_tokens[...])
