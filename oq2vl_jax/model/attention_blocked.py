"""Attention of packed rows in plain XLA that looks only as far back as documents reach: exact, on any device.

A row is cut into blocks of queries and blocks of keys of the same size. All blocks of a row look at once at the block
that lies `back` blocks before their own, for back = 0, 1, 2, ... until the longest document is covered; softmax is
accumulated on the way (arXiv 2112.05682). Two documents of at most one block and a token need back = 0 and 1:

    blocks       0       1       2       3
    documents    a a a a a b b b b b c c c c . .
    back = 0     0->0    1->1    2->2    3->3        within the block, causal
    back = 1             1->0    2->1    3->2        the block before; after it nothing is left to see

The number of rounds is read off the batch (a traced loop bound), so a document of any length is exact: one that fills
the row costs as much as the reference. The gradient is written out (custom_vjp), by the same rounds.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

HIDDEN_SCORE = -1e30
"""Of a key that a query may not see; finite, so that a row of nothing else gives no NaN."""


def block_size(num_tokens: int) -> int:
    """Tokens in a block. Small blocks skip more, large ones multiply faster (docs/experiments.md)."""
    return 64 if num_tokens <= 512 else 128


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def blocked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    starts: Int[Array, "B T"],
    size: int | None = None,
) -> Float[Array, "B T N H"]:
    """Token t of a row attends to tokens starts[b, t] .. t. Scores and softmax are float32. size: tokens in a block."""
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
    given = blocks.queries(cotangent)
    own = (given.astype(jnp.float32) * blocks.queries(attended)).sum(-1)

    def look_back(back, carry):
        q_gradient, k_gradient, v_gradient = carry
        weights = jnp.exp(blocks.scores(queries, keys, back) - log_norm[..., None])
        v_part = blocks.product("BKbQS,BKbQH->BKbSH", weights.astype(v.dtype), given)
        from_value = blocks.product("BKbQH,BKbSH->BKbQS", given, blocks.shifted(values, back))
        error = (blocks.scale * weights * (from_value - own[..., None])).astype(q.dtype)
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
        self.size = min(size or block_size(self.num_tokens), self.num_tokens)
        self.num_blocks = -(-self.num_tokens // self.size)
        self.padding = self.num_blocks * self.size - self.num_tokens
        self.scale = self.head_dim**-0.5
        own = jnp.arange(self.num_tokens, dtype=starts.dtype)
        reach = (own // self.size - starts // self.size).max()  # blocks before its own that a token looks into
        self.num_rounds = reach + 1
        padded = jnp.pad(starts, ((0, 0), (0, self.padding)), constant_values=self.num_blocks * self.size)
        self.starts = padded.reshape(self.batch, self.num_blocks, self.size)

    def queries(self, x: Array) -> Array:
        """[B T N H] to [B K b Q H], the queries of a group of heads below each other."""
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
        """[B T K H] to [B K 2b S H]: as many empty blocks before the row as it has, for the first blocks to look at."""
        x = jnp.pad(x, ((0, 0), (0, self.padding), (0, 0), (0, 0)))
        x = x.reshape(self.batch, self.num_blocks, self.size, self.num_kv_heads, self.head_dim).transpose(0, 3, 1, 2, 4)
        return jnp.pad(x, ((0, 0), (0, 0), (self.num_blocks, 0), (0, 0), (0, 0)))

    def key_tokens(self, x: Array) -> Array:
        """Inverse of keys."""
        x = x[:, :, self.num_blocks :].transpose(0, 2, 3, 1, 4)
        return x.reshape(self.batch, -1, self.num_kv_heads, self.head_dim)[:, : self.num_tokens]

    def shifted(self, keys: Array, back: Array) -> Array:
        """For each block the one `back` before it."""
        return jax.lax.dynamic_slice_in_dim(keys, self.num_blocks - back, self.num_blocks, axis=2)

    def added(self, keys: Array, part: Array, back: Array) -> Array:
        """`part` added where shifted(keys, back) was taken."""
        there = self.shifted(keys, back) + part
        return jax.lax.dynamic_update_slice_in_dim(keys, there, self.num_blocks - back, axis=2)

    def scores(self, queries: Array, keys: Array, back: Array) -> Array:
        """float32 [B K b Q S], HIDDEN_SCORE where a query does not see a key."""
        scores = self.scale * self.product("BKbQH,BKbSH->BKbQS", queries, self.shifted(keys, back))
        own = jnp.arange(self.num_blocks * self.size).reshape(self.num_blocks, self.size)
        key_index = (own - back * self.size)[:, None, :]
        is_seen = (key_index >= self.starts[..., None]) & (key_index <= own[:, :, None])
        grouped = scores.reshape(*scores.shape[:3], self.groups, self.size, self.size)
        return jnp.where(is_seen[:, None, :, None], grouped, HIDDEN_SCORE).reshape(scores.shape)

    @staticmethod
    def product(axes: str, a: Array, b: Array) -> Array:
        return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)
