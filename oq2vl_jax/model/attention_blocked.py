"""Exact attention of packed rows in plain XLA, on any device; it computes only as far back as documents reach.

A row is cut into blocks of queries and blocks of keys of the same size. In round `back` = 0, 1, 2, ... every query
block attends to the key block `back` blocks before it, until the longest document is covered; the softmax is
accumulated over the rounds (arXiv 2112.05682). Documents of at most one block plus one token need back = 0 and 1:

    blocks       0       1       2       3
    documents    a a a a a b b b b b c c c c . .
    back = 0     0->0    1->1    2->2    3->3        within the block, causal
    back = 1             1->0    2->1    3->2        the previous block; no document reaches further back

The number of rounds is a traced loop bound computed from the batch, so documents of any length are exact; a document
that fills the row costs as much as the reference. The backward pass (custom_vjp) runs the same rounds.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

HIDDEN_SCORE = -1e30
"""Score of a masked key; finite, so that a query whose keys are all masked gives no NaN."""

BLOCK_SIZE = 64
"""Tokens per block. Small blocks skip more, large ones multiply faster (docs/experiments.md)."""


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def blocked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    starts: Int[Array, "B T"],
    size: int | None = None,
) -> Float[Array, "B T N H"]:
    """Token t of a row attends to tokens starts[b, t] .. t. Scores and softmax are float32. size: tokens per block."""
    return _forward(q, k, v, starts, size)[0]


def _forward(q, k, v, starts, size):
    blocks = _Blocks(q, k, starts, size)
    queries, keys, values = blocks.queries(q), blocks.keys(k), blocks.keys(v)

    def look_back(back, carry):
        highest, total, attended = carry
        scores = blocks.scores(queries, keys, back)
        new_highest = jnp.maximum(highest, scores.max(-1))
        weights = jnp.exp(scores - new_highest[..., None])
        rescale = jnp.exp(highest - new_highest)
        part = blocks.product("BKbQS,BKbSH->BKbQH", weights.astype(v.dtype), blocks.shifted(values, back))
        return new_highest, rescale * total + weights.sum(-1), rescale[..., None] * attended + part

    shape = queries.shape[:-1]
    carry = (jnp.full(shape, HIDDEN_SCORE), jnp.zeros(shape), jnp.zeros(queries.shape, jnp.float32))
    highest, total, attended = jax.lax.fori_loop(0, blocks.num_rounds, look_back, carry)
    attended = checkpoint_name(blocks.tokens(attended / total[..., None]).astype(q.dtype), "attention_output")
    log_norm = checkpoint_name(highest + jnp.log(total), "attention_log_norm")
    return attended, (q, k, v, starts, attended, log_norm)


def _backward(size, saved, cotangent):
    q, k, v, starts, attended, log_norm = saved
    blocks = _Blocks(q, k, starts, size)
    queries, keys, values = blocks.queries(q), blocks.keys(k), blocks.keys(v)
    output_gradient = blocks.queries(cotangent)
    delta = (output_gradient.astype(jnp.float32) * blocks.queries(attended)).sum(-1)

    def look_back(back, carry):
        q_gradient, k_gradient, v_gradient = carry
        weights = jnp.exp(blocks.scores(queries, keys, back) - log_norm[..., None])
        v_part = blocks.product("BKbQS,BKbQH->BKbSH", weights.astype(v.dtype), output_gradient)
        from_value = blocks.product("BKbQH,BKbSH->BKbQS", output_gradient, blocks.shifted(values, back))
        error = (blocks.scale * weights * (from_value - delta[..., None])).astype(q.dtype)
        q_gradient += blocks.product("BKbQS,BKbSH->BKbQH", error, blocks.shifted(keys, back))
        k_part = blocks.product("BKbQS,BKbQH->BKbSH", error, queries)
        return q_gradient, blocks.added(k_gradient, k_part, back), blocks.added(v_gradient, v_part, back)

    carry = (jnp.zeros(queries.shape, jnp.float32), *(jnp.zeros(keys.shape, jnp.float32) for _ in "kv"))
    q_gradient, k_gradient, v_gradient = jax.lax.fori_loop(0, blocks.num_rounds, look_back, carry)
    k_gradient, v_gradient = (blocks.key_tokens(x).astype(k.dtype) for x in (k_gradient, v_gradient))
    return blocks.tokens(q_gradient).astype(q.dtype), k_gradient, v_gradient, None


blocked_attention.defvjp(_forward, _backward)


class _Blocks:
    """The blocked view of one batch. Axes: K kv heads, b blocks, Q = G * size queries, S = size keys."""

    def __init__(self, q: Array, k: Array, starts: Array, size: int | None):
        self.batch, self.num_tokens, num_heads, self.head_dim = q.shape
        self.num_kv_heads = k.shape[2]
        self.groups = num_heads // self.num_kv_heads
        self.size = min(size or BLOCK_SIZE, self.num_tokens)
        self.num_blocks = -(-self.num_tokens // self.size)
        self.padding = self.num_blocks * self.size - self.num_tokens
        self.scale = self.head_dim**-0.5
        index = jnp.arange(self.num_tokens, dtype=starts.dtype)
        reach = (index // self.size - starts // self.size).max()  # most blocks that a token looks back
        self.num_rounds = reach + 1
        padded = jnp.pad(starts, ((0, 0), (0, self.padding)), constant_values=self.num_blocks * self.size)
        self.starts = padded.reshape(self.batch, self.num_blocks, self.size)

    def queries(self, x: Array) -> Array:
        """Reshapes [B T N H] to [B K b Q H]; the heads of a group are stacked along Q."""
        x = jnp.pad(x, ((0, 0), (0, self.padding), (0, 0), (0, 0)))
        x = x.reshape(self.batch, self.num_blocks, self.size, self.num_kv_heads, self.groups, self.head_dim)
        x = x.transpose(0, 3, 1, 4, 2, 5)
        return x.reshape(self.batch, self.num_kv_heads, self.num_blocks, self.groups * self.size, self.head_dim)

    def tokens(self, x: Array) -> Array:
        """Inverse of queries."""
        x = x.reshape(self.batch, self.num_kv_heads, self.num_blocks, self.groups, self.size, self.head_dim)
        x = x.transpose(0, 2, 4, 1, 3, 5).reshape(self.batch, self.num_blocks * self.size, -1, self.head_dim)
        return x[:, : self.num_tokens]

    def keys(self, x: Array) -> Array:
        """Reshapes [B T K H] to [B K 2b S H]; b zero blocks before the row keep the slices of `shifted` in bounds."""
        x = jnp.pad(x, ((0, 0), (0, self.padding), (0, 0), (0, 0)))
        x = x.reshape(self.batch, self.num_blocks, self.size, self.num_kv_heads, self.head_dim).transpose(0, 3, 1, 2, 4)
        return jnp.pad(x, ((0, 0), (0, 0), (self.num_blocks, 0), (0, 0), (0, 0)))

    def key_tokens(self, x: Array) -> Array:
        """Inverse of keys."""
        x = x[:, :, self.num_blocks :].transpose(0, 2, 3, 1, 4)
        return x.reshape(self.batch, -1, self.num_kv_heads, self.head_dim)[:, : self.num_tokens]

    def shifted(self, keys: Array, back: Array) -> Array:
        """Returns for each block the block `back` places before it."""
        return jax.lax.dynamic_slice_in_dim(keys, self.num_blocks - back, self.num_blocks, axis=2)

    def added(self, keys: Array, part: Array, back: Array) -> Array:
        """Adds `part` to the blocks that shifted(keys, back) reads."""
        summed = self.shifted(keys, back) + part
        return jax.lax.dynamic_update_slice_in_dim(keys, summed, self.num_blocks - back, axis=2)

    def scores(self, queries: Array, keys: Array, back: Array) -> Array:
        """Returns float32 scores [B K b Q S], HIDDEN_SCORE for masked keys."""
        scores = self.scale * self.product("BKbQH,BKbSH->BKbQS", queries, self.shifted(keys, back))
        query_index = jnp.arange(self.num_blocks * self.size).reshape(self.num_blocks, self.size)
        key_index = (query_index - back * self.size)[:, None, :]
        is_seen = (key_index >= self.starts[..., None]) & (key_index <= query_index[:, :, None])
        grouped = scores.reshape(*scores.shape[:3], self.groups, self.size, self.size)
        return jnp.where(is_seen[:, None, :, None], grouped, HIDDEN_SCORE).reshape(scores.shape)

    @staticmethod
    def product(axes: str, a: Array, b: Array) -> Array:
        return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)
