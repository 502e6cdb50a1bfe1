"""Attention of packed rows as a Pallas-Triton kernel: tiles outside a document are never loaded (arXiv 2205.14135).

Each program computes one query tile of one head. It loops over key tiles, from the start of its first query's
document to its own tile, so a row of short documents costs only its diagonal. The drawing has square tiles; query and
key tiles may differ in size if one is a multiple of the other:

    keys      0 1 2 3         documents  a a a a a b b b . .  (tiles of two tokens: |a a|a a|a b|b b|. .|)
    tile 0    x
    tile 1    x x
    tile 2    x x x                      its first query still belongs to a
    tile 3        x x                    b starts in tile 2
    tile 4            x

Grouped queries read their kv head in place; no key or value is repeated. The backward pass has one kernel for dq and
one for dk and dv, which sums over the heads of a group. The output and the log-sum-exp have the checkpoint names
"attention_output" and "attention_log_norm" (layers.remat_layer). The tile sizes compile for compute capability 8.0 and
above; none has been timed yet. jax 0.11 deprecates Pallas's Triton backend; only this file uses it.
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
"""Tokens per query tile and per key tile."""
FORWARD_PARAMS = plgpu.CompilerParams(num_warps=4, num_stages=3)
BACKWARD_PARAMS = plgpu.CompilerParams(num_warps=4, num_stages=2)


def is_supported(head_dim: int) -> bool:
    """Returns whether the kernel runs heads of this width: 16 to 128; Triton needs a power of two, at least 16."""
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

    interpret: runs in Pallas's interpreter, slowly, on any device. tiles: tokens per query tile and per key tile;
    powers of two.
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
    delta = (cotangent.astype(jnp.float32) * attended).sum(-1)
    delta = jnp.pad(delta, ((0, 0), (0, starts.shape[1] - num_tokens), (0, 0))).transpose(0, 2, 1)
    q, k, v, cotangent = (_pad_tokens(x, max(tiles)) for x in (q, k, v, cotangent))
    q_gradient = _q_gradient(q, k, v, cotangent, delta, log_norm, starts, interpret, tiles)
    k_gradient, v_gradient = _kv_gradients(q, k, v, cotangent, delta, log_norm, starts, num_kv_heads, interpret, tiles)
    return q_gradient[:, :num_tokens], k_gradient[:, :num_tokens], v_gradient[:, :num_tokens], None


kernel_attention.defvjp(_forward, _backward)


def _q_gradient(q, k, v, cotangent, delta, log_norm, starts, interpret, tiles):
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
    )(q, k, v, cotangent, delta, log_norm, starts, first_tile)  # fmt: skip


def _kv_gradients(q, k, v, cotangent, delta, log_norm, starts, num_kv_heads, interpret, tiles):
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
    )(q, k, v, cotangent, delta, log_norm, starts, last_tile)  # fmt: skip


def _forward_kernel(q_ref, k_ref, v_ref, starts_ref, first_tile_ref, attended_ref, log_norm_ref, *, key_tile):
    q, starts = q_ref[...], starts_ref[...]
    first_query, num_queries = pl.program_id(0) * len(starts), len(starts)

    def over_keys(j, carry):
        highest, total, attended = carry
        key_slice = pl.ds(j * key_tile, key_tile)
        scores = _scores(q, k_ref[key_slice, :], starts, first_query, j * key_tile)
        new_highest = jnp.maximum(highest, scores.max(-1))
        weights = jnp.exp(scores - new_highest[:, None])
        rescale = jnp.exp(highest - new_highest)
        values = v_ref[key_slice, :]
        attended = rescale[:, None] * attended + plgpu.dot(weights.astype(values.dtype), values)
        return new_highest, rescale * total + weights.sum(-1), attended

    carry = (jnp.full(num_queries, HIDDEN_SCORE), jnp.zeros(num_queries), jnp.zeros(q.shape, jnp.float32))
    end_tile = (first_query + num_queries - 1) // key_tile + 1
    highest, total, attended = jax.lax.fori_loop(first_tile_ref[...], end_tile, over_keys, carry)
    attended_ref[...] = (attended / total[:, None]).astype(attended_ref.dtype)
    log_norm_ref[...] = highest + jnp.log(total)


def _q_gradient_kernel(
    q_ref, k_ref, v_ref, cotangent_ref, delta_ref, log_norm_ref, starts_ref, first_tile_ref, gradient_ref, *, key_tile
):
    q, starts, cotangent = q_ref[...], starts_ref[...], cotangent_ref[...]
    delta, log_norm = delta_ref[...], log_norm_ref[...]
    first_query, num_queries = pl.program_id(0) * len(starts), len(starts)

    def over_keys(j, gradient):
        key_slice = pl.ds(j * key_tile, key_tile)
        keys = k_ref[key_slice, :]
        weights = jnp.exp(_scores(q, keys, starts, first_query, j * key_tile) - log_norm[:, None])
        error = weights * (plgpu.dot(cotangent, v_ref[key_slice, :], trans_b=True) - delta[:, None])
        return gradient + plgpu.dot(error.astype(keys.dtype), keys)

    end_tile = (first_query + num_queries - 1) // key_tile + 1
    gradient = jax.lax.fori_loop(first_tile_ref[...], end_tile, over_keys, jnp.zeros(q.shape, jnp.float32))
    gradient_ref[...] = (q.shape[-1] ** -0.5 * gradient).astype(gradient_ref.dtype)


def _kv_gradient_kernel(
    q_ref, k_ref, v_ref, cotangent_ref, delta_ref, log_norm_ref, starts_ref, last_tile_ref, dk_ref, dv_ref, *,
    groups, query_tile,
):  # fmt: skip
    keys, values = k_ref[...], v_ref[...]
    first_key = pl.program_id(0) * keys.shape[0]
    first_tile = first_key // query_tile
    num_tiles = last_tile_ref[...] + 1 - first_tile

    def over_queries(step, carry):
        k_gradient, v_gradient = carry
        head, i = step // num_tiles, first_tile + step % num_tiles
        query_slice = pl.ds(i * query_tile, query_tile)
        q, cotangent = q_ref[query_slice, head, :], cotangent_ref[query_slice, head, :]
        scores = _scores(q, keys, starts_ref[query_slice], i * query_tile, first_key)
        weights = jnp.exp(scores - log_norm_ref[head, query_slice][:, None])
        v_gradient += plgpu.dot(weights.astype(cotangent.dtype), cotangent, trans_a=True)
        error = weights * (plgpu.dot(cotangent, values, trans_b=True) - delta_ref[head, query_slice][:, None])
        return k_gradient + plgpu.dot(error.astype(q.dtype), q, trans_a=True), v_gradient

    zeros = jnp.zeros(keys.shape, jnp.float32)
    k_gradient, v_gradient = jax.lax.fori_loop(0, groups * num_tiles, over_queries, (zeros, zeros))
    dk_ref[...] = (keys.shape[-1] ** -0.5 * k_gradient).astype(dk_ref.dtype)
    dv_ref[...] = v_gradient.astype(dv_ref.dtype)


def _scores(q, keys, starts, first_query, first_key):
    """Returns float32 scores of a query tile against a key tile, HIDDEN_SCORE for masked keys."""
    query_index = first_query + jnp.arange(q.shape[0])
    key_index = first_key + jnp.arange(keys.shape[0])
    is_seen = (key_index[None, :] >= starts[:, None]) & (key_index[None, :] <= query_index[:, None])
    return jnp.where(is_seen, q.shape[-1] ** -0.5 * plgpu.dot(q, keys, trans_b=True), HIDDEN_SCORE)


def _ends(starts: Array) -> Array:
    """Returns the index of the last token of each token's document."""
    num_tokens = starts.shape[1]
    index = jnp.arange(num_tokens, dtype=starts.dtype)
    is_last = jnp.pad(starts[:, 1:] != starts[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    return jax.lax.cummin(jnp.where(is_last, index, num_tokens), axis=1, reverse=True)


def _pad_tokens(x: Array, tile: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), *((0, 0),) * (x.ndim - 2)))


def _padded(q, k, v, starts, tile):
    """Pads rows to whole tiles; each added token is a document of its own."""
    q, k, v = (_pad_tokens(x, tile) for x in (q, k, v))
    index = jnp.arange(q.shape[1], dtype=starts.dtype)
    padded = _pad_tokens(starts, tile)
    return q, k, v, jnp.where(index < starts.shape[1], padded, index)
