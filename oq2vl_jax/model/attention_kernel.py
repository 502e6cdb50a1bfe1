"""Attention of packed rows as a Pallas-Triton kernel: tiles outside a document are never loaded (arXiv 2205.14135).

One program computes one tile of queries of one head; it walks from the tile where the first document of its queries
starts to its own, so a row of short documents costs its diagonal:

    keys      0 1 2 3         documents  a a a a a b b b . .  (tiles of two tokens: |a a|a a|a b|b b|. .|)
    tile 0    x
    tile 1    x x
    tile 2    x x x                      its first query still belongs to a
    tile 3        x x                    b starts in tile 2
    tile 4            x

Grouped queries read their key head in place, nothing is repeated. The backward pass has one kernel for the queries'
gradient, one for keys' and values', which sums over the heads of a group itself. Output and log-sum-exp carry the
checkpoint names "attention_output" and "attention_log_norm" (layers.remat_layer). Tile sizes were chosen so that the
kernels compile for compute capability 8.0 and above; none has been timed yet. jax 0.11 calls this backend of Pallas
deprecated: it is used here alone.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from oq2vl_jax.model.attention_blocked import HIDDEN_SCORE

TILE = 64
"""Tokens in a tile of queries and of keys."""
FORWARD_PARAMS = plgpu.CompilerParams(num_warps=4, num_stages=3)
BACKWARD_PARAMS = plgpu.CompilerParams(num_warps=4, num_stages=2)


def is_supported(head_dim: int) -> bool:
    """Triton wants powers of two, and a tile product at least 16 wide."""
    return head_dim in (16, 32, 64, 128)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def kernel_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    starts: Int[Array, "B T"],
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Token t of a row attends to tokens starts[b, t] .. t. Scores and softmax are float32.

    interpret: run by Pallas' interpreter, on any device, slowly.
    """
    return _forward(q, k, v, starts, interpret)[0]


def _forward(q, k, v, starts, interpret):
    num_tokens = q.shape[1]
    q, k, v, starts = _padded(q, k, v, starts)
    batch, length, num_heads, head_dim = q.shape
    groups = num_heads // k.shape[2]
    first_tile = starts.reshape(batch, -1, TILE).min(-1) // TILE
    attended, log_norm = pl.pallas_call(
        _forward_kernel,
        grid=(length // TILE, num_heads, batch),
        in_specs=[
            pl.BlockSpec((None, TILE, None, head_dim), lambda i, n, b: (b, i, n, 0)),
            pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n // groups, 0)),
            pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n // groups, 0)),
            pl.BlockSpec((None, TILE), lambda i, n, b: (b, i)),
            pl.BlockSpec((None, None), lambda i, n, b: (b, i)),
        ],
        out_specs=[
            pl.BlockSpec((None, TILE, None, head_dim), lambda i, n, b: (b, i, n, 0)),
            pl.BlockSpec((None, None, TILE), lambda i, n, b: (b, n, i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32),
        ],
        compiler_params=FORWARD_PARAMS,
        interpret=interpret,
        name="document_attention_forward",
    )(q, k, v, starts, first_tile)
    attended = checkpoint_name(attended[:, :num_tokens], "attention_output")
    log_norm = checkpoint_name(log_norm, "attention_log_norm")
    return attended, (q[:, :num_tokens], k[:, :num_tokens], v[:, :num_tokens], starts, attended, log_norm)


def _backward(interpret, saved, cotangent):
    q, k, v, starts, attended, log_norm = saved
    num_tokens, num_kv_heads = q.shape[1], k.shape[2]
    own = (cotangent.astype(jnp.float32) * attended).sum(-1)
    own = jnp.pad(own, ((0, 0), (0, starts.shape[1] - num_tokens), (0, 0))).transpose(0, 2, 1)
    q, k, v, cotangent = (_pad_tokens(x) for x in (q, k, v, cotangent))
    q_gradient = _q_gradient(q, k, v, cotangent, own, log_norm, starts, interpret)
    k_gradient, v_gradient = _kv_gradients(q, k, v, cotangent, own, log_norm, starts, num_kv_heads, interpret)
    return q_gradient[:, :num_tokens], k_gradient[:, :num_tokens], v_gradient[:, :num_tokens], None


kernel_attention.defvjp(_forward, _backward)


def _q_gradient(q, k, v, cotangent, own, log_norm, starts, interpret):
    batch, length, num_heads, head_dim = q.shape
    groups = num_heads // k.shape[2]
    first_tile = starts.reshape(batch, -1, TILE).min(-1) // TILE
    tile = pl.BlockSpec((None, TILE, None, head_dim), lambda i, n, b: (b, i, n, 0))
    row = pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n // groups, 0))
    numbers = pl.BlockSpec((None, None, TILE), lambda i, n, b: (b, n, i))
    return pl.pallas_call(
        _q_gradient_kernel,
        grid=(length // TILE, num_heads, batch),
        in_specs=[
            tile, row, row, tile, numbers, numbers,
            pl.BlockSpec((None, TILE), lambda i, n, b: (b, i)),
            pl.BlockSpec((None, None), lambda i, n, b: (b, i)),
        ],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=BACKWARD_PARAMS,
        interpret=interpret,
        name="document_attention_q_gradient",
    )(q, k, v, cotangent, own, log_norm, starts, first_tile)  # fmt: skip


def _kv_gradients(q, k, v, cotangent, own, log_norm, starts, num_kv_heads, interpret):
    batch, length, num_heads, head_dim = q.shape
    groups = num_heads // num_kv_heads
    last_tile = _ends(starts).reshape(batch, -1, TILE).max(-1) // TILE
    group = pl.BlockSpec((None, length, groups, head_dim), lambda j, h, b: (b, 0, h, 0))
    tile = pl.BlockSpec((None, TILE, None, head_dim), lambda j, h, b: (b, j, h, 0))
    numbers = pl.BlockSpec((None, groups, length), lambda j, h, b: (b, h, 0))
    return pl.pallas_call(
        partial(_kv_gradient_kernel, groups=groups),
        grid=(length // TILE, num_kv_heads, batch),
        in_specs=[
            group, tile, tile, group, numbers, numbers,
            pl.BlockSpec((None, length), lambda j, h, b: (b, 0)),
            pl.BlockSpec((None, None), lambda j, h, b: (b, j)),
        ],
        out_specs=[tile, tile],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=BACKWARD_PARAMS,
        interpret=interpret,
        name="document_attention_kv_gradients",
    )(q, k, v, cotangent, own, log_norm, starts, last_tile)  # fmt: skip


def _forward_kernel(q_ref, k_ref, v_ref, starts_ref, first_tile_ref, attended_ref, log_norm_ref):
    tile = pl.program_id(0)
    q, starts = q_ref[...], starts_ref[...]

    def over_keys(j, carry):
        highest, total, attended = carry
        here = pl.ds(j * TILE, TILE)
        scores = _scores(q, k_ref[here, :], starts, tile, j)
        new_highest = jnp.maximum(highest, scores.max(-1))
        weights = jnp.exp(scores - new_highest[:, None])
        rescale = jnp.exp(highest - new_highest)
        values = v_ref[here, :]
        attended = rescale[:, None] * attended + plgpu.dot(weights.astype(values.dtype), values)
        return new_highest, rescale * total + weights.sum(-1), attended

    carry = (jnp.full(TILE, HIDDEN_SCORE), jnp.zeros(TILE), jnp.zeros(q.shape, jnp.float32))
    highest, total, attended = jax.lax.fori_loop(first_tile_ref[...], tile + 1, over_keys, carry)
    attended_ref[...] = (attended / total[:, None]).astype(attended_ref.dtype)
    log_norm_ref[...] = highest + jnp.log(total)


def _q_gradient_kernel(
    q_ref, k_ref, v_ref, cotangent_ref, own_ref, log_norm_ref, starts_ref, first_tile_ref, gradient_ref
):
    tile = pl.program_id(0)
    q, starts, cotangent = q_ref[...], starts_ref[...], cotangent_ref[...]
    own, log_norm = own_ref[...], log_norm_ref[...]

    def over_keys(j, gradient):
        here = pl.ds(j * TILE, TILE)
        keys = k_ref[here, :]
        weights = jnp.exp(_scores(q, keys, starts, tile, j) - log_norm[:, None])
        error = weights * (plgpu.dot(cotangent, v_ref[here, :], trans_b=True) - own[:, None])
        return gradient + plgpu.dot(error.astype(keys.dtype), keys)

    gradient = jax.lax.fori_loop(first_tile_ref[...], tile + 1, over_keys, jnp.zeros(q.shape, jnp.float32))
    gradient_ref[...] = (q.shape[-1] ** -0.5 * gradient).astype(gradient_ref.dtype)


def _kv_gradient_kernel(
    q_ref, k_ref, v_ref, cotangent_ref, own_ref, log_norm_ref, starts_ref, last_tile_ref, dk_ref, dv_ref, *, groups
):
    tile = pl.program_id(0)
    keys, values = k_ref[...], v_ref[...]
    num_tiles = last_tile_ref[...] + 1 - tile

    def over_queries(step, carry):
        k_gradient, v_gradient = carry
        head, i = step // num_tiles, tile + step % num_tiles
        here = pl.ds(i * TILE, TILE)
        q, cotangent = q_ref[here, head, :], cotangent_ref[here, head, :]
        weights = jnp.exp(_scores(q, keys, starts_ref[here], i, tile) - log_norm_ref[head, here][:, None])
        v_gradient += plgpu.dot(weights.astype(cotangent.dtype), cotangent, trans_a=True)
        error = weights * (plgpu.dot(cotangent, values, trans_b=True) - own_ref[head, here][:, None])
        return k_gradient + plgpu.dot(error.astype(q.dtype), q, trans_a=True), v_gradient

    zeros = jnp.zeros(keys.shape, jnp.float32)
    k_gradient, v_gradient = jax.lax.fori_loop(0, groups * num_tiles, over_queries, (zeros, zeros))
    dk_ref[...] = (keys.shape[-1] ** -0.5 * k_gradient).astype(dk_ref.dtype)
    dv_ref[...] = v_gradient.astype(dv_ref.dtype)


def _scores(q, keys, starts, query_tile, key_tile):
    """float32 [TILE, TILE], HIDDEN_SCORE where a query does not see a key."""
    own = query_tile * TILE + jnp.arange(TILE)
    key_index = key_tile * TILE + jnp.arange(TILE)
    is_seen = (key_index[None, :] >= starts[:, None]) & (key_index[None, :] <= own[:, None])
    return jnp.where(is_seen, q.shape[-1] ** -0.5 * plgpu.dot(q, keys, trans_b=True), HIDDEN_SCORE)


def _ends(starts: Array) -> Array:
    """The last token of each token's document."""
    num_tokens = starts.shape[1]
    own = jnp.arange(num_tokens, dtype=starts.dtype)
    is_last = jnp.pad(starts[:, 1:] != starts[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    return jax.lax.cummin(jnp.where(is_last, own, num_tokens), axis=1, reverse=True)


def _pad_tokens(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE), *((0, 0),) * (x.ndim - 2)))


def _padded(q, k, v, starts):
    """Rows of whole tiles; a padding token is its own document."""
    q, k, v = (_pad_tokens(x) for x in (q, k, v))
    own = jnp.arange(q.shape[1], dtype=starts.dtype)
    padded = _pad_tokens(starts)
    return q, k, v, jnp.where(own < starts.shape[1], padded, own)
