"""Dense Qwen decoders: GQA, RoPE, SwiGLU, RMSNorm.

Qwen2 and Qwen2.5 (arXiv 2407.10671; Hugging Face Qwen2ForCausalLM) have biases of q, k and v. Qwen3 (arXiv 2505.09388;
Qwen3ForCausalLM) has none, and an RMSNorm of every head of q and k.

The layers are stored stacked; training (by default) and decoding run them one by one. The KV cache is immutable: a
call takes one and returns an updated one.
"""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from oq2vl_jax.config import Attention, DecoderConfig
from oq2vl_jax.model.attention import Mask, attention, packed_mask
from oq2vl_jax.model.layers import (
    Compute,
    Linear,
    RMSNorm,
    normal,
    remat_layer,
    run_layers,
    side_by_side,
    split_columns,
    stack_layers,
    unstacked,
)
from oq2vl_jax.model.scopes import Scope


class KVCache(NamedTuple):
    """Keys and values of S slots, one array per layer. Slot s of a row holds the token at position s of that row.

    A token at position p sees slots 0..p only, so later slots (a prompt's padding, for example) do not affect it.
    """

    k: tuple[Float[Array, "B S K H"], ...]
    v: tuple[Float[Array, "B S K H"], ...]


class LayerCache(NamedTuple):
    """Keys and values of one layer: of the tokens of a call, or of the S slots of a cache."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]


class Rope(NamedTuple):
    """cos and sin of the angle of each pair i at each position p: p * theta ** (-2 i / H), float32."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


class Qwen2Attention(nnx.Module):
    def __init__(self, key: Array, config: DecoderConfig):
        width, std = config.hidden_size, init_std(config)
        q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        keys = jax.random.split(key, 4)
        self.q_proj = Linear(keys[0], width, q_dim, ("embed", "heads"), std, config.has_qkv_bias)
        self.k_proj = Linear(keys[1], width, kv_dim, ("embed", "heads"), std, config.has_qkv_bias)
        self.v_proj = Linear(keys[2], width, kv_dim, ("embed", "heads"), std, config.has_qkv_bias)
        self.q_norm, self.k_norm = (
            nnx.data(RMSNorm(config.head_dim, config.rms_norm_eps) if config.has_qk_norm else None) for _ in "qk"
        )
        self.qkv_proj: Linear | None = nnx.data(None)  # of a fused layer
        self.o_proj = Linear(keys[3], q_dim, width, ("heads", "embed"), std, use_bias=False)
        self.head_dim, self.widths = config.head_dim, (q_dim, kv_dim, kv_dim)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        mask: Mask,
        implementation: Attention,
        cache: LayerCache | None,
        slots: Int[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Returns the output and the keys and values of x, or the cache with them written to `slots`."""
        if self.qkv_proj is None:
            projected = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        else:
            projected = jnp.split(self.qkv_proj(x), np.cumsum(self.widths)[:-1], axis=-1)
        q, k, v = (part.reshape(*x.shape[:2], -1, self.head_dim) for part in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cache is not None:
            rows = jnp.arange(x.shape[0])[:, None]
            k, v = cache.k.at[rows, slots].set(k), cache.v.at[rows, slots].set(v)
        with jax.named_scope(Scope.ATTENTION):
            attended = attention(q, k, v, mask, implementation).reshape(*x.shape[:2], -1)
        return self.o_proj(attended), LayerCache(k, v)


@partial(jax.checkpoint, prevent_cse=False)
def gated(gate: Float[Array, "B T F"], up: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """Returns silu(gate) * up. The backward pass computes it again: keeping its parts costs more than exp."""
    return jax.nn.silu(gate) * up


class Qwen2MLP(nnx.Module):
    def __init__(self, key: Array, config: DecoderConfig):
        width, hidden, std = config.hidden_size, config.intermediate_size, init_std(config)
        keys = jax.random.split(key, 3)
        self.gate_proj = Linear(keys[0], width, hidden, ("embed", "mlp"), std, use_bias=False)
        self.up_proj = Linear(keys[1], width, hidden, ("embed", "mlp"), std, use_bias=False)
        self.gate_up_proj: Linear | None = nnx.data(None)  # of a fused layer
        self.widths = (hidden, hidden)
        self.down_proj = Linear(keys[2], hidden, width, ("mlp", "embed"), std, use_bias=False)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(gated(gate, up))


class Qwen2Layer(nnx.Module):
    def __init__(self, key: Array, config: DecoderConfig):
        attention_key, mlp_key = jax.random.split(key)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Qwen2Attention(attention_key, config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Qwen2MLP(mlp_key, config)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        mask: Mask,
        implementation: Attention = "xla",
        cache: LayerCache | None = None,
        slots: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """One block. slots: where the keys and values of x go in the cache; see Qwen2Attention."""
        attended, cache = self.self_attn(self.input_layernorm(x), rope, mask, implementation, cache, slots)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


Layers = Qwen2Layer | tuple[Qwen2Layer, ...]
"""A stack (one module whose parameters have a leading axis "layers"), or the layers one by one."""


class Qwen2Decoder(nnx.Module):
    def __init__(self, key: Array, config: DecoderConfig):
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        std = init_std(config)
        self.embed_tokens = normal(embed_key, (config.vocab_size, config.hidden_size), std, ("vocab", "embed"))
        self.layers: Layers = stack_layers(partial(Qwen2Layer, config=config), layers_key, config.num_layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.tie_word_embeddings:
            self.lm_head = None
        else:
            self.lm_head = normal(head_key, (config.vocab_size, config.hidden_size), std, ("vocab", "embed"))
        self.config = config

    @property
    def head(self) -> Float[Array, "V D"]:
        """The output matrix; logits = hidden @ head.T."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head)[...]

    def set_head(self, value: Float[Array, "V D"]) -> None:
        (self.embed_tokens if self.lm_head is None else self.lm_head)[...] = value

    def unstacked_layers(self) -> tuple[Qwen2Layer, ...]:
        """Returns the layers as a tuple. On a CPU, decoding with a scan over the stack takes four times as long."""
        assert isinstance(self.layers, Qwen2Layer), "a stack"
        return unstacked(self.layers, self.config.num_layers)

    def embed(self, tokens: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
        return self.embed_tokens[...][tokens].astype(dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        compute: Compute = Compute(),
    ) -> Float[Array, "B T D"]:
        """Maps embeddings in compute.dtype to final hidden states."""
        mask = packed_mask(segment_ids, positions, compute.attention, compute.tiles)
        rope = rope_table(positions, self.config)

        def apply(x, layer):
            layer = compute.gather(layer) if compute.gather else layer
            return layer(x, rope, mask, compute.attention)[0]

        apply = remat_layer(apply, compute.remat, is_gathered=compute.gather is not None)
        return self.norm(run_layers(apply, x, self.layers))

    def prefill(
        self, layers: Iterable[Qwen2Layer], x: Float[Array, "B T D"], num_slots: int
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Runs prompts from position 0 on and fills the first T of num_slots slots. `layers`: unstacked."""
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        mask = positions[:, :, None] >= positions[:, None, :]
        rope = rope_table(positions, self.config)
        caches = []
        for layer in layers:
            x, kv = layer(x, rope, mask)
            caches.append([jnp.pad(array, ((0, 0), (0, num_slots - x.shape[1]), (0, 0), (0, 0))) for array in kv])
        k, v = zip(*caches, strict=True)
        return self.norm(x), KVCache(k, v)

    def extend(
        self, layers: Iterable[Qwen2Layer], x: Float[Array, "B T D"], positions: Int[Array, "B T"], cache: KVCache
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Runs T more tokens of each row against the cache and writes their keys and values to slot = position.

        The positions of a row ascend without gaps; a position past the last slot is not written.
        """
        mask = jnp.arange(cache.k[0].shape[1]) <= positions[:, :, None]
        rope = rope_table(positions, self.config)
        caches = []
        for layer, k, v in zip(layers, *cache, strict=True):
            x, kv = layer(x, rope, mask, "xla", LayerCache(k, v), positions)
            caches.append(kv)
        k, v = zip(*caches, strict=True)
        return self.norm(x), KVCache(k, v)


def fused(layers: Qwen2Layer, with_gate_up: bool = True) -> Qwen2Layer:
    """Fuses q, k, v into one matrix, and gate, up into another, for fewer, larger products. Stacked layers too.

    The stored parameters stay separate, under Hugging Face's names; training fuses its compute copy once per step.
    """
    layers = jax.tree.map(lambda x: x, layers)
    attn, mlp = layers.self_attn, layers.mlp
    attn.qkv_proj = side_by_side(attn.q_proj, attn.k_proj, attn.v_proj)
    attn.q_proj = attn.k_proj = attn.v_proj = None  # pyright: ignore[reportAttributeAccessIssue]
    if with_gate_up:
        mlp.gate_up_proj = side_by_side(mlp.gate_proj, mlp.up_proj)
        mlp.gate_proj = mlp.up_proj = None  # pyright: ignore[reportAttributeAccessIssue]
    return layers


def unfused(layers: Qwen2Layer) -> Qwen2Layer:
    """Inverse of fused, for gradients with respect to fused layers."""
    layers = jax.tree.map(lambda x: x, layers)
    attn, mlp = layers.self_attn, layers.mlp
    assert attn.qkv_proj is not None
    attn.q_proj, attn.k_proj, attn.v_proj = split_columns(attn.qkv_proj, attn.widths)
    attn.qkv_proj = None
    if mlp.gate_up_proj is not None:
        mlp.gate_proj, mlp.up_proj = split_columns(mlp.gate_up_proj, mlp.widths)
        mlp.gate_up_proj = None
    return layers


def init_std(config: DecoderConfig) -> float:
    """Returns the standard deviation of initial matrices: width ** -0.5, which is 0.0255 at the published width.

    Hugging Face uses 0.02 at every width. Narrow models then learn late, because every block adds almost nothing.
    """
    return config.hidden_size**-0.5


def init_cache(config: DecoderConfig, batch: int, num_slots: int, dtype: DTypeLike) -> KVCache:
    shape = (batch, num_slots, config.num_kv_heads, config.head_dim)
    k, v = ([jnp.zeros(shape, dtype) for _ in range(config.num_layers)] for _ in "kv")
    return KVCache(tuple(k), tuple(v))


def cache_bytes(config: DecoderConfig, batch: int, num_slots: int, dtype: DTypeLike) -> int:
    """Returns the bytes that init_cache allocates."""
    return 2 * config.num_layers * batch * num_slots * config.num_kv_heads * config.head_dim * np.dtype(dtype).itemsize


def rope_table(positions: Int[Array, "B T"], config: DecoderConfig) -> Rope:
    """Returns the rotations of a batch; they are made once for all layers."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    inv_freq = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    inv_freq = jnp.asarray(inv_freq, config.rope_inv_freq).astype(jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * inv_freq
    return Rope(jnp.cos(angles), jnp.sin(angles))


def apply_rope(x: Float[Array, "B T N H"], rope: Rope) -> Float[Array, "B T N H"]:
    """Rotates pairs (i, i + H / 2), the half-split layout of Hugging Face; float32 inside."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rope.cos[:, :, None], rope.sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def layer_flops(config: DecoderConfig) -> int:
    """Returns the forward FLOPs of a token in all layers: 2 x their matrix parameters."""
    q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * q_dim + 2 * kv_dim + 3 * config.intermediate_size)
    return 2 * config.num_layers * layer


def logits_flops(config: DecoderConfig) -> int:
    """Returns the forward FLOPs of the logits of a position, 2 x V x D, though only labelled ones are computed."""
    return 2 * config.vocab_size * config.hidden_size


def attention_flops(config: DecoderConfig) -> int:
    """Returns the forward FLOPs of a query-key pair in all layers, 4 x N x H x L; n tokens have n (n + 1) / 2 pairs."""
    return 4 * config.num_heads * config.head_dim * config.num_layers
