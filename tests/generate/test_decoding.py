"""Cached, batched decoding against the plain forward pass, one prompt at a time; sampling against its definition."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from oq2vl_jax.checkpoint import find_checkpoint
from oq2vl_jax.config import MeshConfig
from oq2vl_jax.data.samples.images import decode_image
from oq2vl_jax.generate.decoding import Sampling, choose
from oq2vl_jax.generate.generator import Generator, Request
from oq2vl_jax.generate.loading import load_model
from oq2vl_jax.generate.reply import SamplingOptions
from oq2vl_jax.model.qwen2 import cache_bytes, init_cache
from oq2vl_jax.sharding import make_mesh
from tests.data.conftest import png
from tests.generate.conftest import MODEL

NEW_TOKENS = 20  # more than are decoded in one call
MAX_SCORE_ERROR = 2e-5  # measured 4e-6, log-probabilities summed over three tokens


@pytest.fixture(scope="module")
def generator(checkpoint):
    return Generator(checkpoint)


@pytest.fixture(scope="module")
def requests(generator):
    """Five prompts of different lengths, with 0, 1 or 2 images; the second and fourth share one."""
    pictures = [png(seed=i) for i in range(3)]
    texts = (("abc", []), ("what is it", [0]), ("a longer question " * 3, [1, 2]), ("x", [0]), ("hello there", []))
    return [
        Request(generator.encode_prompt(text, len(images)), [pictures[i] for i in images]) for text, images in texts
    ]


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(find_checkpoint(checkpoint), make_mesh(MeshConfig()))


@jax.jit
def plain_logits(model, tokens, images, segments):
    positions = jnp.arange(tokens.shape[1])[None]
    return model.logits(model(tokens, images, segments, positions))[0]


def logits_of(model, tokens, images, padded_length=192):
    """Of every position, by the forward pass of training; what follows the tokens is padding of segment 0."""
    padded = np.zeros((1, padded_length), np.int32)
    padded[0, : len(tokens)] = tokens
    pixels = np.zeros((1, 2, 32, 32, 3), np.uint8)
    for i, data in enumerate(images):
        pixels[0, i] = decode_image(data, 32)
    segments = (np.arange(padded_length) < len(tokens)).astype(np.int32)[None]
    return np.asarray(plain_logits(model, padded, pixels, segments))[: len(tokens)]


def greedy_without_cache(model, request, stops):
    """One whole forward pass per new token."""
    tokens = list(request.prompt)
    while len(tokens) < len(request.prompt) + NEW_TOKENS:
        token = int(logits_of(model, tokens, request.images)[-1].argmax())
        if token in stops:
            break
        tokens.append(token)
    return tokens[len(request.prompt) :]


def test_cached_batched_decoding_equals_the_plain_forward_pass_one_by_one(generator, model, requests):
    together = generator.generate(requests, SamplingOptions(NEW_TOKENS))
    assert len({token for reply in together for token in reply.tokens}) > 20, "the replies are too much alike to tell"
    for request, reply in zip(requests, together, strict=True):
        assert reply.tokens == greedy_without_cache(model, request, {258, 256})


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 4}])
def test_batched_is_one_by_one_whatever_else_is_in_the_batch(generator, requests, options):
    options = SamplingOptions(NEW_TOKENS, **options)
    together = generator.generate(requests, options)
    for request, reply in zip(requests, together, strict=True):
        assert generator.generate([request], options) == [reply]
    assert generator.generate(requests[::-1], options) == together[::-1]
    in_batches = dict(generator.generate_all(requests, options, batch_size=2))
    assert [in_batches[i] for i in range(5)] == together


def test_jitted_is_eager_is_sharded(generator, requests):
    """The generator runs on 8 simulated devices; the same without jit, and with everything on one of them."""
    options = SamplingOptions(3)
    sharded = generator.generate(requests[:2], options)
    assert generator.mesh.size == 8
    with jax.disable_jit():
        eager = generator.generate(requests[:2], options)
    assert eager == sharded
    alone = Generator(generator.checkpoint)
    alone.mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    alone.weights, alone.stop_tokens = jax.device_put((alone.weights, alone.stop_tokens), jax.devices()[0])
    assert alone.generate(requests[:2], options) == sharded


def test_streamed_text_is_the_text(generator, requests):
    for temperature in (0.0, 1.0):
        options = SamplingOptions(NEW_TOKENS, temperature=temperature)
        for request in requests[:3]:
            pieces = list(generator.stream(request, options))
            assert "".join(pieces) == generator.generate([request], options)[0].text


def test_a_stop_text_ends_the_reply_and_is_cut_off(generator, requests):
    options = SamplingOptions(NEW_TOKENS, temperature=1.0, seed=2)
    for request in requests:
        text = generator.generate([request], options)[0].text
        stop = text[4:6]
        stopping = SamplingOptions(NEW_TOKENS, temperature=1.0, seed=2, stop=("never", stop))
        reply = generator.generate([request], stopping)[0]
        assert (reply.text, reply.finish_reason) == (text[: text.index(stop)], "stop")
        assert "".join(generator.stream(request, stopping)) == reply.text


def test_the_length_ends_a_reply_and_says_so(generator, requests):
    reply = generator.generate(requests[:1], SamplingOptions(3))[0]
    assert (len(reply.tokens), reply.finish_reason) == (3, "length")


def test_options_score_their_log_probability_under_the_plain_forward_pass(generator, model, requests):
    options = [[[97], [98, 99, 100], [120, 97]], [[65, 66, 67]], [[1], [2]], [[97, 98]] * 4, [[3, 4], [5]]]
    scores = generator.score(requests, options)
    for request, of_row, scored in zip(requests, options, scores, strict=True):
        assert len(scored) == len(of_row)
        for option, score in zip(of_row, scored, strict=True):
            logits = logits_of(model, request.prompt + option, request.images)[len(request.prompt) - 1 : -1]
            expected = jax.nn.log_softmax(logits)[np.arange(len(option)), np.array(option)].sum()
            assert abs(score - expected) < MAX_SCORE_ERROR
    assert generator.score(requests[2:3], options[2:3])[0] == pytest.approx(scores[2], abs=MAX_SCORE_ERROR)


def drawn(logits, **options):
    """Frequencies of 20,000 draws from one row of logits."""
    num = 20_000
    values = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | options
    sampling = Sampling(*(jnp.full(num, value) for value in values.values()), jnp.arange(num))
    tokens = choose(jnp.tile(jnp.array(logits), (num, 1)), sampling, jnp.full(num, 7))
    counts = Counter(np.asarray(tokens).tolist())
    return {token: count / num for token, count in sorted(counts.items())}


def test_sampling_follows_temperature_top_k_and_top_p():
    logits = np.log([0.5, 0.3, 0.15, 0.05]).astype(np.float32)
    assert drawn(logits) == pytest.approx({0: 0.5, 1: 0.3, 2: 0.15, 3: 0.05}, abs=0.015)
    squared = np.array([0.25, 0.09, 0.0225, 0.0025])
    assert drawn(logits, temperature=0.5) == pytest.approx(dict(enumerate(squared / squared.sum())), abs=0.015)
    assert drawn(logits, top_k=2) == pytest.approx({0: 0.625, 1: 0.375}, abs=0.015)
    assert drawn(logits, top_p=0.75) == pytest.approx({0: 0.625, 1: 0.375}, abs=0.015)
    assert drawn(logits, top_p=0.81, top_k=3) == pytest.approx({0: 0.625, 1: 0.375}, abs=0.015), "top-p after top-k"
    assert drawn(logits, top_p=1e-6) == {0: 1.0}
    assert drawn(logits, temperature=0.0) == {0: 1.0}


def test_allowed_tokens_are_those_of_transformers_warpers():
    import torch
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    rng = np.random.default_rng(0)
    for temperature, top_k, top_p in ((0.7, 20, 0.9), (1.3, 5, 0.5), (1.0, 64, 0.99)):
        logits = rng.normal(size=64).astype(np.float32) * 2
        warped = torch.from_numpy(logits)[None]
        for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)):
            warped = warper(None, warped)
        allowed = set(torch.isfinite(warped[0]).nonzero()[:, 0].tolist())
        found = drawn(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        assert set(found) <= allowed
        probabilities = torch.softmax(warped[0], -1)
        for token in allowed:
            assert found.get(token, 0) == pytest.approx(float(probabilities[token]), abs=0.015)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bytes_of_a_cache_are_those_that_it_allocates(dtype):
    cache = init_cache(MODEL.decoder, 3, 40, dtype)
    assert cache_bytes(MODEL.decoder, 3, 40, dtype) == sum(x.nbytes for x in jax.tree.leaves(cache))
