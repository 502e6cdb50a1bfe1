"""Generates on the device: one prefill over the prompts, then cached decoding, each jitted once per shape.

Prompts of a batch are padded on the right, and a token's slot in the cache is its position. A row's first new token
therefore overwrites its first padding slot, and a token at position p sees slots 0..p, which hold no padding. A
batch gives the same output as its prompts one by one, without the masks and shifted positions of left padding.

    prompt of 3, padded to 5   a b c . .      the row sees slots 0..2
    after two new tokens       a b c x y      the row sees slots 0..4

Rows are independent of each other. Their random numbers depend only on a row's seed and position.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from oq2vl_jax.model.layers import Compute
from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
from oq2vl_jax.model.qwen2 import KVCache, Qwen2Layer, fused

NOTHING = -1
"""Marks places after the stop token of a row, positions without a visual token, and the padding of options."""


class Weights(NamedTuple):
    """A model split for decoding: `model` without the decoder's layers, and `layers`, the same layers unstacked."""

    model: OpenQwen2VL
    layers: tuple[Qwen2Layer, ...]


class Sampling(NamedTuple):
    """Sampling options of each of B rows. temperature 0 = the most likely token; top_k 0, top_p 1 = no limit."""

    temperature: Float[Array, "B"]
    top_p: Float[Array, "B"]
    top_k: Int[Array, "B"]
    seed: Int[Array, "B"]


class DecodeState(NamedTuple):
    """token: the last chosen token, at `position`, not in the cache yet; is_done: a stop token was chosen."""

    token: Int[Array, "B"]
    position: Int[Array, "B"]
    is_done: Bool[Array, "B"]
    cache: KVCache


class TokenScores(NamedTuple):
    """Log-probabilities under the model, before temperature, top-k and top-p. chosen: of the chosen tokens; top: of the
    K most likely tokens, best first."""

    chosen: Float[Array, "B steps"]
    top: Float[Array, "B steps K"]
    top_tokens: Int[Array, "B steps K"]


def take_apart(model: OpenQwen2VL, dtype: str) -> Weights:
    """Splits a model for decoding and casts the decoder's matrices to `dtype`. The result has no stacked layers."""
    layers = tuple(with_transposed_kernels(fused(layer)) for layer in model.decoder.unstacked_layers())
    shell = jax.tree.map(lambda x: x, model)
    shell.decoder.layers = nnx.data(())
    if dtype != "float32":
        layers, shell.decoder = jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, (layers, shell.decoder))
    return Weights(shell, layers)


def with_transposed_kernels(layer: Qwen2Layer) -> Qwen2Layer:
    for part, names in (
        (layer.self_attn, ("qkv_proj", "o_proj")),
        (layer.mlp, ("gate_up_proj", "down_proj")),
    ):
        for name in names:
            setattr(part, name, getattr(part, name).transposed())
    return layer


@partial(jax.jit, static_argnames="dtype")
def encode_images(
    model: OpenQwen2VL, images: UInt8[Array, "I height width 3"], dtype: str = "float32"
) -> Float[Array, "I M D"]:
    """Encodes images to visual tokens. model: Weights.model."""
    return model.encode(images, Compute(dtype=jnp.dtype(dtype)))


@partial(jax.jit, static_argnames=("num_slots", "dtype"))
def prefill(
    weights: Weights,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    visual_tokens: Float[Array, "N D"] | None,
    visual_index: Int[Array, "B T"],
    num_slots: int,
    dtype: str = "float32",
) -> tuple[Float[Array, "B V"], KVCache]:
    """Runs the prompts. Returns float32 logits of the token after each, and a cache of num_slots >= T slots.

    tokens: row b holds lengths[b] >= 1 tokens, then padding. visual_index: index of the visual token at each position,
    or NOTHING. The rows share visual_tokens.
    """
    x = weights.model.decoder.embed(tokens, jnp.dtype(dtype))
    if visual_tokens is not None:
        x = jnp.where((visual_index >= 0)[:, :, None], visual_tokens[jnp.maximum(visual_index, 0)].astype(x.dtype), x)
    hidden, cache = weights.model.decoder.prefill(weights.layers, x, num_slots)
    last = hidden[jnp.arange(len(tokens)), lengths - 1]
    return weights.model.logits(last[:, None])[:, 0], cache


@jax.jit
def start(
    logits: Float[Array, "B V"],
    cache: KVCache,
    lengths: Int[Array, "B"],
    sampling: Sampling,
    stop_tokens: Int[Array, "stops"],
) -> DecodeState:
    """Chooses the first new token of each row after prefill."""
    token = choose(logits, sampling, lengths)
    return DecodeState(token, lengths, jnp.isin(token, stop_tokens), cache)


@partial(jax.jit, static_argnames="num_top")
def first_scores(logits: Float[Array, "B V"], token: Int[Array, "B"], num_top: int) -> TokenScores:
    """Scores the first new tokens; the axis of steps has length 1."""
    return TokenScores(*(x[:, None] for x in score_tokens(logits, token, num_top)))


def score_tokens(logits: Float[Array, "B V"], token: Int[Array, "B"], num_top: int) -> TokenScores:
    """Scores one token per row; the result has no axis of steps."""
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    top, top_tokens = jax.lax.top_k(scores, min(num_top, scores.shape[-1]))
    chosen = jnp.take_along_axis(scores, token[:, None], axis=-1)[:, 0]
    return TokenScores(chosen, top, top_tokens.astype(jnp.int32))


@partial(jax.jit, static_argnames=("num_steps", "dtype", "num_top"), donate_argnames="state")
def decode(
    weights: Weights,
    state: DecodeState,
    sampling: Sampling,
    stop_tokens: Int[Array, "stops"],
    num_steps: int,
    dtype: str = "float32",
    num_top: int = 0,
) -> tuple[DecodeState, Int[Array, "B num_steps"], TokenScores | None]:
    """Generates num_steps more tokens per row, up to and including its stop token, then NOTHING.

    Ends early when all rows are done. num_top: if above 0, also returns scores of the chosen tokens and of the num_top
    most likely ones.
    """
    batch = state.token.shape[0]

    def is_running(carry):
        step, state, _, _ = carry
        return (step < num_steps) & ~state.is_done.all()

    def step_once(carry):
        step, state, output, scores = carry
        x = weights.model.decoder.embed(state.token[:, None], jnp.dtype(dtype))
        hidden, cache = weights.model.decoder.extend(weights.layers, x, state.position[:, None], state.cache)
        position = state.position + 1
        logits = weights.model.logits(hidden)[:, 0]
        token = choose(logits, sampling, position)
        output = output.at[:, step].set(jnp.where(state.is_done, NOTHING, token))
        if scores is not None:
            of_step = score_tokens(logits, token, num_top)
            scores = jax.tree.map(lambda whole, new: whole.at[:, step].set(new), scores, of_step)
        is_done = state.is_done | jnp.isin(token, stop_tokens)
        return step + 1, DecodeState(token, position, is_done, cache), output, scores

    output = jnp.full((batch, num_steps), NOTHING, jnp.int32)
    scores = None
    if num_top:
        top = (batch, num_steps, min(num_top, weights.model.config.decoder.vocab_size))
        scores = TokenScores(jnp.zeros((batch, num_steps)), jnp.zeros(top), jnp.zeros(top, jnp.int32))
    _, state, output, scores = jax.lax.while_loop(is_running, step_once, (0, state, output, scores))
    return state, output, scores


@partial(jax.jit, donate_argnums=0)
def insert_row(state: DecodeState, row: DecodeState, index: Int[Array, ""]) -> DecodeState:
    """Replaces row `index` of `state` with the only row of `row`, whose cache may have fewer slots."""

    def put(old, new):
        start = (index, *[0] * (old.ndim - 1))
        return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start)

    return jax.tree.map(put, state, row)


def choose(logits: Float[Array, "B V"], sampling: Sampling, positions: Int[Array, "B"]) -> Int[Array, "B"]:
    """Chooses the next token of each row: the most likely, or a draw after temperature, top-k and top-p, in the order
    of transformers' warpers. Tokens as likely as the least likely kept token are kept too."""
    greedy = logits.argmax(-1).astype(jnp.int32)

    def draw():
        scaled = logits / jnp.maximum(sampling.temperature, 1e-6)[:, None]
        descending = -jnp.sort(-scaled, axis=-1)
        rank = jnp.arange(logits.shape[-1])
        top_k = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[-1])
        in_top_k = jnp.where(rank < top_k[:, None], descending, -jnp.inf)
        probabilities = jax.nn.softmax(in_top_k, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = (before < sampling.top_p[:, None]) & jnp.isfinite(in_top_k)
        kept = kept.at[:, 0].set(True)
        threshold = jnp.where(kept, descending, jnp.inf).min(-1, keepdims=True)
        allowed = jnp.where(scaled >= threshold, scaled, -jnp.inf)
        noise = jax.vmap(partial(row_noise, num_tokens=logits.shape[-1]))(sampling.seed, positions)
        drawn = (allowed + noise).argmax(-1).astype(jnp.int32)
        return jnp.where(sampling.temperature > 0, drawn, greedy)

    return jax.lax.cond((sampling.temperature > 0).any(), draw, lambda: greedy)


def row_noise(seed: Int[Array, ""], position: Int[Array, ""], num_tokens: int) -> Float[Array, "V"]:
    """Returns the Gumbel noise of one row at one position."""
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (num_tokens,))


@partial(jax.jit, static_argnames="dtype")
def score_options(
    weights: Weights,
    logits: Float[Array, "B V"],
    cache: KVCache,
    lengths: Int[Array, "B"],
    options: Int[Array, "B O T"],
    dtype: str = "float32",
) -> Float[Array, "B O"]:
    """Returns the log-probability of each option after its row's prompt, summed over the option's tokens.

    logits, cache: from prefill, with T - 1 spare slots. options: padded with NOTHING; an empty option scores 0. The
    prompt runs once, and each option continues from a copy of its cache; the last of the T tokens is never run.
    """
    batch, num_options, num_tokens = options.shape
    targets = jnp.maximum(options, 0)
    first = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, :, 0], axis=-1)[:, :, None]
    if num_tokens > 1:
        shared = jax.tree.map(lambda x: jnp.repeat(x, num_options, axis=0), cache)
        x = weights.model.decoder.embed(targets.reshape(-1, num_tokens)[:, :-1], jnp.dtype(dtype))
        positions = jnp.repeat(lengths, num_options)[:, None] + jnp.arange(num_tokens - 1)
        hidden, _ = weights.model.decoder.extend(weights.layers, x, positions, shared)
        following = jax.nn.log_softmax(weights.model.logits(hidden)).reshape(batch, num_options, num_tokens - 1, -1)
        later = jnp.take_along_axis(following, targets[:, :, 1:, None], axis=-1)[..., 0]
        first = jnp.concatenate([first, later], axis=-1)
    return jnp.where(options >= 0, first, 0.0).sum(-1)
