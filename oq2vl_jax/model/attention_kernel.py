"""Attention of packed rows as a Pallas-Triton kernel: tiles outside a document are never loaded (arXiv 2205.14135).

Drawn with square tiles; those of queries and of keys may differ in size, each a multiple of the smaller.

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

TILES = (64, 64)
"""Tokens in a tile of queries, and in one of keys."""
FORWARD_PARAMS = plgpu.CompilerParams(num_warps=4, num_stages=3)
BACKWARD_PARAMS = plgpu.CompilerParams(num_warps=4, num_stages=2)


def is_supported(head_dim: int) -> bool:
    """Triton wants powers of two, and a tile product at least 16 wide."""
    return head_dim in (16, 32, 64, 128)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def kernel_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    starts: Int[Array, "B T"],
    interpret: bool = False,
    tiles: tuple[int, int] = TILES,
) -> Float[Array, "B T N H"]:
    """Token t of a row attends to tokens starts[b, t] .. t. Scores and softmax are float32.

    interpret: run by Pallas' interpreter, on any device, slowly. tiles: tokens in a tile of queries, and in one of
    keys; powers of two.
    """
    return _forward(q, k, v, starts, interpret, tiles)[0]


def _forward(q, k, v, starts, interpret, tiles):
    num_tokens, (query_tile, key_tile) = q.shape[1], tiles
    q, k, v, starts = _padded(q, k, v, starts, max(tiles))
    batch, length, num_heads, head_dim = q.shape
    groups = num_heads // k.shape[2]
    first_tile = starts.reshape(batch, -1, query_tile).min(-1) // key_tile
    attended, log_norm = pl.pallas_call(
        partial(_forward_kernel, key_tile=key_tile),
        grid=(length // query_tile, num_heads, batch),
        in_specs=[
            pl.BlockSpec((None, query_tile, None, head_dim), lambda i, n, b: (b, i, n, 0)),
            pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n // groups, 0)),
            pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n // groups, 0)),
            pl.BlockSpec((None, query_tile), lambda i, n, b: (b, i)),
            pl.BlockSpec((None, None), lambda i, n, b: (b, i)),
        ],
        out_specs=[
            pl.BlockSpec((None, query_tile, None, head_dim), lambda i, n, b: (b, i, n, 0)),
            pl.BlockSpec((None, None, query_tile), lambda i, n, b: (b, n, i)),
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


def _backward(interpret, tiles, saved, cotangent):
    q, k, v, starts, attended, log_norm = saved
    num_tokens, num_kv_heads = q.shape[1], k.shape[2]
    own = (cotangent.astype(jnp.float32) * attended).sum(-1)
    own = jnp.pad(own, ((0, 0), (0, starts.shape[1] - num_tokens), (0, 0))).transpose(0, 2, 1)
    q, k, v, cotangent = (_pad_tokens(x, max(tiles)) for x in (q, k, v, cotangent))
    q_gradient = _q_gradient(q, k, v, cotangent, own, log_norm, starts, interpret, tiles)
    k_gradient, v_gradient = _kv_gradients(q, k, v, cotangent, own, log_norm, starts, num_kv_heads, interpret, tiles)
    return q_gradient[:, :num_tokens], k_gradient[:, :num_tokens], v_gradient[:, :num_tokens], None


kernel_attention.defvjp(_forward, _backward)


def _q_gradient(q, k, v, cotangent, own, log_norm, starts, interpret, tiles):
    (batch, length, num_heads, head_dim), (query_tile, key_tile) = q.shape, tiles
    groups = num_heads // k.shape[2]
    first_tile = starts.reshape(batch, -1, query_tile).min(-1) // key_tile
    tile = pl.BlockSpec((None, query_tile, None, head_dim), lambda i, n, b: (b, i, n, 0))
    row = pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n // groups, 0))
    numbers = pl.BlockSpec((None, None, query_tile), lambda i, n, b: (b, n, i))
    return pl.pallas_call(
        partial(_q_gradient_kernel, key_tile=key_tile),
        grid=(length // query_tile, num_heads, batch),
        in_specs=[
            tile, row, row, tile, numbers, numbers,
            pl.BlockSpec((None, query_tile), lambda i, n, b: (b, i)),
            pl.BlockSpec((None, None), lambda i, n, b: (b, i)),
        ],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=BACKWARD_PARAMS,
        interpret=interpret,
        name="document_attention_q_gradient",
    )(q, k, v, cotangent, own, log_norm, starts, first_tile)  # fmt: skip


def _kv_gradients(q, k, v, cotangent, own, log_norm, starts, num_kv_heads, interpret, tiles):
    (batch, length, num_heads, head_dim), (query_tile, key_tile) = q.shape, tiles
    groups = num_heads // num_kv_heads
    last_tile = _ends(starts).reshape(batch, -1, key_tile).max(-1) // query_tile
    group = pl.BlockSpec((None, length, groups, head_dim), lambda j, h, b: (b, 0, h, 0))
    tile = pl.BlockSpec((None, key_tile, None, head_dim), lambda j, h, b: (b, j, h, 0))
    numbers = pl.BlockSpec((None, groups, length), lambda j, h, b: (b, h, 0))
    return pl.pallas_call(
        partial(_kv_gradient_kernel, groups=groups, query_tile=query_tile),
        grid=(length // key_tile, num_kv_heads, batch),
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


def _forward_kernel(q_ref, k_ref, v_ref, starts_ref, first_tile_ref, attended_ref, log_norm_ref, *, key_tile):
    q, starts = q_ref[...], starts_ref[...]
    first_query, num_queries = pl.program_id(0) * len(starts), len(starts)

    def over_keys(j, carry):
        highest, total, attended = carry
        here = pl.ds(j * key_tile, key_tile)
        scores = _scores(q, k_ref[here, :], starts, first_query, j * key_tile)
        new_highest = jnp.maximum(highest, scores.max(-1))
        weights = jnp.exp(scores - new_highest[:, None])
        rescale = jnp.exp(highest - new_highest)
        values = v_ref[here, :]
        attended = rescale[:, None] * attended + plgpu.dot(weights.astype(values.dtype), values)
        return new_highest, rescale * total + weights.sum(-1), attended

    carry = (jnp.full(num_queries, HIDDEN_SCORE), jnp.zeros(num_queries), jnp.zeros(q.shape, jnp.float32))
    end_tile = (first_query + num_queries - 1) // key_tile + 1
    highest, total, attended = jax.lax.fori_loop(first_tile_ref[...], end_tile, over_keys, carry)
    attended_ref[...] = (attended / total[:, None]).astype(attended_ref.dtype)
    log_norm_ref[...] = highest + jnp.log(total)


def _q_gradient_kernel(
    q_ref, k_ref, v_ref, cotangent_ref, own_ref, log_norm_ref, starts_ref, first_tile_ref, gradient_ref, *, key_tile
):
    q, starts, cotangent = q_ref[...], starts_ref[...], cotangent_ref[...]
    own, log_norm = own_ref[...], log_norm_ref[...]
    first_query, num_queries = pl.program_id(0) * len(starts), len(starts)

    def over_keys(j, gradient):
        here = pl.ds(j * key_tile, key_tile)
        keys = k_ref[here, :]
        weights = jnp.exp(_scores(q, keys, starts, first_query, j * key_tile) - log_norm[:, None])
        error = weights * (plgpu.dot(cotangent, v_ref[here, :], trans_b=True) - own[:, None])
        return gradient + plgpu.dot(error.astype(keys.dtype), keys)

    end_tile = (first_query + num_queries - 1) // key_tile + 1
    gradient = jax.lax.fori_loop(first_tile_ref[...], end_tile, over_keys, jnp.zeros(q.shape, jnp.float32))
    gradient_ref[...] = (q.shape[-1] ** -0.5 * gradient).astype(gradient_ref.dtype)


def _kv_gradient_kernel(
    q_ref, k_ref, v_ref, cotangent_ref, own_ref, log_norm_ref, starts_ref, last_tile_ref, dk_ref, dv_ref, *,
    groups, query_tile,
):  # fmt: skip
    keys, values = k_ref[...], v_ref[...]
    first_key = pl.program_id(0) * keys.shape[0]
    first_tile = first_key // query_tile
    num_tiles = last_tile_ref[...] + 1 - first_tile

    def over_queries(step, carry):
        k_gradient, v_gradient = carry
        head, i = step // num_tiles, first_tile + step % num_tiles
        here = pl.ds(i * query_tile, query_tile)
        q, cotangent = q_ref[here, head, :], cotangent_ref[here, head, :]
        scores = _scores(q, keys, starts_ref[here], i * query_tile, first_key)
        weights = jnp.exp(scores - log_norm_ref[head, here][:, None])
        v_gradient += plgpu.dot(weights.astype(cotangent.dtype), cotangent, trans_a=True)
        error = weights * (plgpu.dot(cotangent, values, trans_b=True) - own_ref[head, here][:, None])
        return k_gradient + plgpu.dot(error.astype(q.dtype), q, trans_a=True), v_gradient

    zeros = jnp.zeros(keys.shape, jnp.float32)
    k_gradient, v_gradient = jax.lax.fori_loop(0, groups * num_tiles, over_queries, (zeros, zeros))
    dk_ref[...] = (keys.shape[-1] ** -0.5 * k_gradient).astype(dk_ref.dtype)
    dv_ref[...] = v_gradient.astype(dv_ref.dtype)


def _scores(q, keys, starts, first_query, first_key):
    """float32 scores of a tile of queries by a tile of keys, HIDDEN_SCORE where a query does not see a key."""
    own = first_query + jnp.arange(q.shape[0])
    key_index = first_key + jnp.arange(keys.shape[0])
    is_seen = (key_index[None, :] >= starts[:, None]) & (key_index[None, :] <= own[:, None])
    return jnp.where(is_seen, q.shape[-1] ** -0.5 * plgpu.dot(q, keys, trans_b=True), HIDDEN_SCORE)


def _ends(starts: Array) -> Array:
    """The last token of each token's document."""
    num_tokens = starts.shape[1]
    own = jnp.arange(num_tokens, dtype=starts.dtype)
    is_last = jnp.pad(starts[:, 1:] != starts[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    return jax.lax.cummin(jnp.where(is_last, own, num_tokens), axis=1, reverse=True)


def _pad_tokens(x: Array, tile: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), *((0, 0),) * (x.ndim - 2)))


def _padded(q, k, v, starts, tile):
    """Rows of whole tiles; a padding token is its own document."""
    q, k, v = (_pad_tokens(x, tile) for x in (q, k, v))
    own = jnp.arange(q.shape[1], dtype=starts.dtype)
    padded = _pad_tokens(starts, tile)
    return q, k, v, jnp.where(own < starts.shape[1], padded, own)
