"""The one entry point of attention, and the document mask.

Packed documents of a row must not see each other:

    segment_ids  1 1 1 2 2 0        0 = padding
    positions    0 1 2 0 1 0
                 key: a b c d e .
    query a           x
    query b           x x
    query c           x x x
    query d                 x
    query e                 x x     a token sees earlier tokens of its own segment, and itself

Row scope (the published behaviour) is the same code with segment_ids 1 1 1 1 1 0 and positions 0 1 2 3 4 0.
Implementations: "xla" is the reference. Faster ones join here, behind the same signature.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q k / sqrt(H)) v with grouped keys and values (N a multiple of K); mask None = everything is seen.

    Scores and softmax are float32. A query that sees nothing (padding) gets a finite, meaningless value.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[2], k.shape[1]
    groups = num_heads // num_kv_heads
    # One matrix product per kv head, the queries of its group below each other: XLA's CPU backend takes 0.5 (forward)
    # and 0.8 (with backward) of the time that it takes for one product per query head.
    grouped = q.reshape(batch, num_queries, num_kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, num_kv_heads, groups * num_queries, head_dim)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BKQH,BKSH->BKQS", grouped, k, preferred_element_type=jnp.float32)
    scores = head_dim**-0.5 * scores.reshape(batch, num_kv_heads, groups, num_queries, num_keys)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    attended = jnp.einsum("BKQS,BKSH->BKQH", weights.reshape(batch, num_kv_heads, groups * num_queries, num_keys), v)
    attended = attended.reshape(batch, num_kv_heads, groups, num_queries, head_dim)
    return attended.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def causal_segment_mask(
    query_segments: Int[Array, "B T"],
    query_positions: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    key_positions: Int[Array, "B S"],
) -> Bool[Array, "B T S"]:
    """True where a query may see a key: same segment, not padding (0), not later. See the drawing above."""
    same_segment = query_segments[:, :, None] == key_segments[:, None, :]
    not_later = query_positions[:, :, None] >= key_positions[:, None, :]
    return same_segment & not_later & (key_segments > 0)[:, None, :]
