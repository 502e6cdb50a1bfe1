"""Entry point of every attention, and the document mask.

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

Implementations (config.TrainConfig.attention); train/attention_choice.py picks one by device:

    xla      the reference: computes every score of a row and masks other documents
    blocked  plain XLA in blocks of queries and keys, as far back as the longest document reaches (attention_blocked.py)
    kernel   Pallas-Triton: never computes tiles outside a document (attention_kernel.py). "kernel_interpreted" is
             the same kernel run by Pallas's interpreter, for tests without a GPU

blocked and kernel take the mask as starts[b, t], the index where token t's document begins. They rely
on data/loading/batch.py: a document is contiguous in its row, and its positions ascend by one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from oq2vl_jax.config import Attention
from oq2vl_jax.model.attention_blocked import blocked_attention
from oq2vl_jax.model.attention_kernel import TILES, kernel_attention

KERNELS = ("kernel", "kernel_interpreted")


class Documents(NamedTuple):
    """Compact mask of packed rows: token t sees tokens starts[b, t] .. t; a padding token sees only itself.

    tiles: tokens per query tile and per key tile; only the kernel uses them.
    """

    starts: Int[Array, "B T"]
    tiles: tuple[int, int] = TILES


Mask = Bool[Array, "B T S"] | Documents | None


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask = None,
    implementation: Attention = "xla",
) -> Float[Array, "B T N H"]:
    """Computes softmax(q k^T / sqrt(H)) v with grouped keys and values (N a multiple of K); mask None hides no key.

    Scores and softmax are float32. A query whose keys are all masked (padding) gets a finite, meaningless value.
    A packed row's mask is the one that packed_mask makes for the implementation; any other mask is for "xla". An image
    (no mask) takes cuDNN with "kernel" in bfloat16, and the reference otherwise. Raises ValueError for a mask that the
    implementation does not take.
    """
    if isinstance(mask, Documents):
        if implementation in KERNELS:
            return kernel_attention(q, k, v, mask.starts, implementation == "kernel_interpreted", mask.tiles)
        if implementation == "blocked":
            return blocked_attention(q, k, v, mask.starts)
    if isinstance(mask, Documents) or (mask is not None and implementation != "xla"):
        raise ValueError(
            f"attention {implementation!r} does not take a mask of type {type(mask).__name__}; packed_mask"
            " makes the one it takes."
        )
    if mask is None and implementation == "kernel" and q.dtype == jnp.bfloat16:
        return image_attention(q, k, v)
    return reference_attention(q, k, v, mask)


@jax.custom_vjp
def image_attention(
    q: Float[Array, "I P N H"], k: Float[Array, "I P N H"], v: Float[Array, "I P N H"]
) -> Float[Array, "I P N H"]:
    """Runs cuDNN's attention without a mask: every patch sees all patches of its image.

    jax refuses cuDNN's backward pass for an odd number of patches, such as 729; one masked patch is then added.
    """
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _image_attention_forward(q, k, v):
    num_images, num_patches = q.shape[:2]

    def even(q, k, v):
        if num_patches % 2 == 0:
            return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
        lengths = jnp.full(num_images, num_patches)
        attended = jax.nn.dot_product_attention(
            q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
        )
        return attended[:, :num_patches]

    return jax.vjp(even, q, k, v)


image_attention.defvjp(_image_attention_forward, lambda pull_back, gradient: pull_back(gradient))


def reference_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Computes attention with every score of the row; arguments as in `attention`."""
    batch, num_queries, num_heads, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[2], k.shape[1]
    groups = num_heads // num_kv_heads
    # The queries of a group are stacked, so each kv head is one matrix product. XLA's CPU backend takes 0.5 (forward)
    # and 0.8 (forward and backward) times as long as with one product per query head.
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
    return checkpoint_name(attended.transpose(0, 3, 1, 2, 4).reshape(q.shape), "attention_output")


def causal_segment_mask(
    query_segments: Int[Array, "B T"],
    query_positions: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    key_positions: Int[Array, "B S"],
) -> Bool[Array, "B T S"]:
    """Returns True if a query may see a key: same segment, not padding (0), not later. See the module's drawing."""
    same_segment = query_segments[:, :, None] == key_segments[:, None, :]
    not_later = query_positions[:, :, None] >= key_positions[:, None, :]
    return same_segment & not_later & (key_segments > 0)[:, None, :]


def packed_mask(
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    implementation: Attention,
    tiles: tuple[int, int] = TILES,
) -> Mask:
    """Builds the mask of packed rows in the form that `implementation` takes, once for all layers."""
    if implementation == "xla":
        return causal_segment_mask(segment_ids, positions, segment_ids, positions)
    index = jnp.arange(positions.shape[1], dtype=positions.dtype)
    return Documents(jnp.where(segment_ids > 0, index - positions, index), tiles)
