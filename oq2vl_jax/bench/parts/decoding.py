"""Part e: times generation in bfloat16, ours and transformers', each in its own process on random weights.

The prompt has a token per patch of a picture and 64 of text, on a CPU at most 128 in all. Only the decoder is timed; no
picture is encoded.
"""

import dataclasses
import importlib.util
from functools import partial
from typing import Any

from oq2vl_jax.bench.parts.setting import Setting, Skipped, median_seconds, prediction
from oq2vl_jax.command import bridge
from oq2vl_jax.config import DecoderConfig
from oq2vl_jax.config_files import load_config

TEXT_TOKENS = 64


def sizes(setting: Setting) -> tuple[DecoderConfig, int, int, tuple[int, ...]]:
    """Returns (decoder, tokens of the prompt, new tokens, batch sizes)."""
    config = load_config(setting.config)
    prompt = config.model.vision.num_patches + TEXT_TOKENS
    if setting.is_gpu:
        return config.model.decoder, prompt, 64, (1, 8, 32)
    layers = min(2, config.model.decoder.num_layers)
    return dataclasses.replace(config.model.decoder, num_layers=layers), min(prompt, 128), 8, (1, 8)


def measure(setting: Setting) -> dict[str, Any]:
    """Measures seconds of prefill, and tokens per second of decoding after it."""
    import jax
    import jax.numpy as jnp

    from oq2vl_jax.generate.decoding import Sampling, decode, prefill, start, take_apart
    from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL

    decoder, num_prompt, num_new, batches = sizes(setting)
    model_config = dataclasses.replace(load_config(setting.config).model, decoder=decoder)
    model = jax.jit(lambda key: OpenQwen2VL(key, model_config))(jax.random.key(0))
    weights = jax.jit(partial(take_apart, dtype="bfloat16"))(model)
    del model
    num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((weights.layers, weights.model.decoder)))
    results, predictions = [], []
    for batch in batches:
        tokens = jnp.ones((batch, num_prompt), jnp.int32)
        lengths, nothing = jnp.full(batch, num_prompt), jnp.full((batch, num_prompt), -1)
        sampling = Sampling(jnp.zeros(batch), jnp.ones(batch), jnp.zeros(batch, int), jnp.zeros(batch, int))

        def fill(batch=batch, tokens=tokens, lengths=lengths, nothing=nothing, sampling=sampling):
            slots = num_prompt + num_new + 1
            logits, cache = prefill(weights, tokens, lengths, None, nothing, slots, "bfloat16")
            return jax.block_until_ready(start(logits, cache, lengths, sampling, jnp.array([-2])))

        def write(fill=fill, sampling=sampling):
            state = fill()
            return jax.block_until_ready(decode(weights, state, sampling, jnp.array([-2]), num_new, "bfloat16"))

        first, both = median_seconds(fill, 3), median_seconds(write, 3)
        rate = batch * num_new / max(both - first, 1e-9)
        results.append({"batch": batch, "prefill_seconds": first, "tokens_per_second": rate})
        limit = batch * setting.rates().memory_rate / num_bytes
        predictions.append(prediction(f"decoding, batch {batch}", "tokens/s", limit, rate, is_rate=True))
    about = {"prompt_tokens": num_prompt, "new_tokens": num_new, "decoder_layers": decoder.num_layers}
    return about | {"weight_bytes": num_bytes, "results": results, "predictions": predictions}


def measure_transformers(setting: Setting) -> dict[str, Any]:
    """Measures the same for transformers' Qwen2 of the same shape."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise Skipped(f"it needs the package {package}")
    RandomDecoder = bridge("time_hf").RandomDecoder

    decoder, num_prompt, num_new, batches = sizes(setting)
    peer, results = RandomDecoder(decoder), []
    for batch in batches:
        seconds = [median_seconds(partial(peer.generate, batch, num_prompt, n), 3) for n in (1, num_new + 1)]
        rate = batch * num_new / max(seconds[1] - seconds[0], 1e-9)
        results.append({"batch": batch, "prefill_seconds": seconds[0], "tokens_per_second": rate})
    return {"device": peer.device, "results": results}
