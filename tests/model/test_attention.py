"""Every implementation of packed attention against a float64 reference written out in numpy, and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oq2vl_jax.model.attention import attention, image_attention, packed_mask, reference_attention
from oq2vl_jax.model.attention_blocked import blocked_attention
from oq2vl_jax.model.attention_kernel import TILES

IMPLEMENTATIONS = ("xla", "blocked", "kernel_interpreted")
OTHER_TILES = ((32, 16), (128, 64), (64, 128), (128, 128), (16, 64))
OUTPUT_TOLERANCE = 2e-6  # of the largest value; measured 4e-7
GRADIENT_TOLERANCE = 1e-5  # of the largest gradient; measured 8e-7
BFLOAT16_TOLERANCE = 2e-2  # of the largest value; measured 6e-3
LENGTHS = ((100, 3, 57, 90, 1), (251,), (64, 64, 64, 64))
"""Documents of each row, of 256 tokens; the rest is padding. The last row ends every document at a tile."""
NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 256, 4, 2, 16


def packed(lengths=LENGTHS, num_tokens=NUM_TOKENS):
    segments, positions = np.zeros((2, len(lengths), num_tokens), np.int32)
    for row, of_row in enumerate(lengths):
        start = 0
        for number, length in enumerate(of_row):
            segments[row, start : start + length] = number + 1
            positions[row, start : start + length] = np.arange(length)
            start += length
    return segments, positions


def inputs(rows=3, num_tokens=NUM_TOKENS, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    heads = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS, NUM_HEADS)
    return [rng.normal(size=(rows, num_tokens, n, HEAD_DIM)).astype(dtype) for n in heads]


def reference(q, k, v, cotangent, segments):
    """Output and gradients in float64, one document, head and query at a time."""
    q, k, v, cotangent = (x.astype(np.float64) for x in (q, k, v, cotangent))
    output, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    groups, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    for b in range(len(q)):
        for n in range(q.shape[2]):
            for t in np.flatnonzero(segments[b]):
                seen = np.flatnonzero((segments[b] == segments[b, t]) & (np.arange(q.shape[1]) <= t))
                keys, values = k[b, seen, n // groups], v[b, seen, n // groups]
                scores = scale * keys @ q[b, t, n]
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                output[b, t, n] = weights @ values
                given = cotangent[b, t, n]
                error = scale * weights * (values @ given - given @ output[b, t, n])
                dq[b, t, n] = error @ keys
                dk[b, seen, n // groups] += error[:, None] * q[b, t, n]
                dv[b, seen, n // groups] += weights[:, None] * given
    return output, dq, dk, dv


def run(name, q, k, v, cotangent, segments, positions, tiles=TILES):
    """(output, dq, dk, dv), padding set to zero."""
    segments, positions = jnp.asarray(segments), jnp.asarray(positions)
    is_real = (segments > 0)[..., None, None]

    @jax.jit
    def compute(q, k, v, cotangent):
        def attended(q, k, v):
            return jnp.where(is_real, attention(q, k, v, packed_mask(segments, positions, name, tiles), name), 0)

        value, pull_back = jax.vjp(attended, q, k, v)
        return value, *pull_back(jnp.where(is_real, cotangent, 0).astype(value.dtype))

    return [np.asarray(x, np.float64) for x in compute(q, k, v, cotangent)]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_output_and_gradients_equal_the_reference(name):
    segments, positions = packed()
    arrays = inputs()
    found = run(name, *(jnp.asarray(x) for x in arrays), segments, positions)
    tolerances = (OUTPUT_TOLERANCE, *[GRADIENT_TOLERANCE] * 3)
    for what, ours, theirs, tolerance in zip("oqkv", found, reference(*arrays, segments), tolerances, strict=True):
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        print(f"{name} {what}: {error:.1e}")
        assert error < tolerance


@pytest.mark.parametrize("tiles", OTHER_TILES)
def test_every_size_of_tiles_gives_the_same(tiles):
    """Rows that no tile divides, documents across tiles, several tiles of the one size within one of the other."""
    segments, positions = packed(((149,), (77, 70), (3, 130, 9)), 150)
    arrays = [jnp.asarray(x) for x in inputs(3, 150, seed=5)]
    found = run("kernel_interpreted", *arrays, segments, positions, tiles)
    for ours, theirs in zip(found, run("xla", *arrays, segments, positions), strict=True):
        assert np.abs(ours - theirs).max() < GRADIENT_TOLERANCE * np.abs(theirs).max()


@pytest.mark.parametrize("name", IMPLEMENTATIONS[1:])
def test_row_scope_and_odd_lengths_equal_the_reference_implementation(name):
    """One document in the whole row, and a row that no tile or block divides."""
    segments, positions = packed(((149,), (77, 70)), 150)
    arrays = [jnp.asarray(x) for x in inputs(2, 150, seed=1)]
    for ours, theirs in zip(
        run(name, *arrays, segments, positions), run("xla", *arrays, segments, positions), strict=True
    ):
        assert np.abs(ours - theirs).max() < GRADIENT_TOLERANCE * np.abs(theirs).max()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_one_document_never_changes_another(name):
    """Bit for bit, forward and gradient: the second document gets other numbers, the rest of the row stays."""
    segments, positions = packed()
    q, k, v, cotangent = inputs(seed=2)
    other = inputs(seed=3)
    is_second = (segments == 2)[..., None, None]
    changed = [np.where(is_second, new, old) for new, old in zip(other, (q, k, v, cotangent), strict=True)]
    before = run(name, *(jnp.asarray(x) for x in (q, k, v, cotangent)), segments, positions)
    after = run(name, *(jnp.asarray(x) for x in changed), segments, positions)
    rest, second = (segments != 2) & (segments > 0), segments == 2
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(old[rest], new[rest])
        assert not np.allclose(old[second], new[second])


@pytest.mark.parametrize("name", IMPLEMENTATIONS[1:])
def test_bfloat16_is_as_exact_as_its_rounding(name):
    segments, positions = packed()
    arrays = inputs(seed=4)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    expected = reference(*(np.asarray(x, np.float32) for x in rounded), segments)
    for ours, theirs in zip(run(name, *rounded, segments, positions), expected, strict=True):
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        print(f"{name}: {error:.1e}")
        assert error < BFLOAT16_TOLERANCE


def test_blocked_attention_looks_no_further_than_documents_reach():
    """The number of rounds is read off the batch: keys that no document reaches may hold anything, NaN included."""
    q, k, v, _ = (jnp.asarray(x[:1]) for x in inputs(seed=5))
    starts = jnp.asarray(np.arange(NUM_TOKENS) // 64 * 64)[None]
    poisoned = k.at[:, :64].set(jnp.nan)
    attended = blocked_attention(q, poisoned, v, starts, 64)
    assert jnp.isfinite(attended[:, 64:]).all()
    assert not jnp.isfinite(attended[:, :64]).any()


@pytest.mark.parametrize("num_patches", [8, 9])
def test_attention_of_images_with_and_without_gradient(num_patches, monkeypatch):
    """cuDNN is not here: jax's own attention stands in, so this is about what is asked of it."""
    asked, real = [], jax.nn.dot_product_attention

    def stand_in(q, k, v, *, implementation, **lengths):
        assert implementation == "cudnn"
        asked.append(q.shape[1])
        return real(q, k, v, implementation="xla", **lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    q, k, v, cotangent = (
        jnp.asarray(np.random.default_rng().normal(size=(2, num_patches, 3, 16)), jnp.float32) for _ in range(4)
    )
    value, pull_back = jax.vjp(image_attention, q, k, v)
    expected, expected_pull_back = jax.vjp(reference_attention, q, k, v)
    for found, right in zip((value, *pull_back(cotangent)), (expected, *expected_pull_back(cotangent)), strict=True):
        assert np.abs(found - right).max() < 1e-5 * np.abs(right).max()  # measured 4e-7
    assert asked == [8 if num_patches == 8 else 10], "an even number where a gradient is taken"
    image_attention(q, k, v)
    assert asked[-1] == num_patches, "nothing is padded without a gradient"


@pytest.mark.parametrize("made_for", ["xla", "blocked", "kernel"])
@pytest.mark.parametrize("used_with", IMPLEMENTATIONS)
def test_a_mask_of_another_implementation_is_refused(made_for, used_with):
    """Whatever the type of the mask, the name decides; blocked and kernel share one form of it."""
    q = jnp.ones((1, 4, 2, 16))
    segments, positions = jnp.ones((1, 4), jnp.int32), jnp.arange(4)[None]
    mask = packed_mask(segments, positions, made_for)
    if (made_for == "xla") == (used_with == "xla"):
        assert attention(q, q, q, mask, used_with).shape == q.shape
    else:
        with pytest.raises(ValueError, match=f"attention '{used_with}' does not take a mask of type"):
            attention(q, q, q, mask, used_with)
