"""Greedy generation: one prefill over the prompts, then cached decoding, both inside one jitted call.

Prompts of a batch are padded on the right. Slot = position in the cache, so a row's first new token overwrites its
first padding slot and padding is never attended to: batched output equals one-by-one output.

    prompt of 3, padded to 5   a b c . .      filled slots 1 1 1 0 0
    after two new tokens       a b c x y      filled slots 1 1 1 1 1
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt8

from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
from oq2vl_jax.model.qwen2 import init_cache


@partial(jax.jit, static_argnames=("max_new_tokens", "stop_id", "dtype"))
def generate_greedy(
    model: OpenQwen2VL,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    images: UInt8[Array, "B I height width 3"],
    max_new_tokens: int,
    stop_id: int,
    dtype: str = "float32",
) -> Int[Array, "B new"]:
    """The most likely continuation of each prompt, at most max_new_tokens; `stop_id` from the stop token on.

    tokens: prompts, row b real up to lengths[b] >= 1; images fill the placeholders in order, unused slots are zero.
    """
    batch, num_tokens = tokens.shape
    rows = jnp.arange(batch)
    positions = jnp.broadcast_to(jnp.arange(num_tokens), tokens.shape)
    cache = init_cache(model.config.decoder, batch, num_tokens + max_new_tokens, jnp.dtype(dtype))
    x = model.embed(tokens, images, jnp.dtype(dtype))
    hidden, cache = model.decoder.extend(x, positions, positions < lengths[:, None], cache)
    token = next_token(model, hidden[rows, lengths - 1])
    output = jnp.full((batch, max_new_tokens), stop_id, jnp.int32)

    def is_running(carry):
        step, token, *_ = carry
        return (step < max_new_tokens) & (token != stop_id).any()

    def decode(carry):
        step, token, cache, output = carry
        output = output.at[:, step].set(token)
        x = model.decoder.embed(token[:, None], jnp.dtype(dtype))
        hidden, cache = model.decoder.extend(x, (lengths + step)[:, None], jnp.ones((batch, 1), bool), cache)
        following = next_token(model, hidden[:, 0])
        return step + 1, jnp.where(token == stop_id, stop_id, following), cache, output

    return jax.lax.while_loop(is_running, decode, (0, token, cache, output))[3]


def next_token(model: OpenQwen2VL, hidden: Array) -> Int[Array, "B"]:
    return model.logits(hidden[:, None])[:, 0].argmax(-1).astype(jnp.int32)
