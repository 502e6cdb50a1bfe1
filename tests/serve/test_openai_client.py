"""OpenAI's own client against the table of docs/server.md: what is done, ignored, or refused by name."""

import asyncio

import httpx
import jax
import numpy as np
import openai
import pytest
from openai.types.chat import ChatCompletion

from oq2vl_jax.generate.generator import Request
from oq2vl_jax.generate.reply import SamplingOptions
from oq2vl_jax.serve.app import Server
from oq2vl_jax.serve.engine import Engine
from oq2vl_jax.serve.gate import Admission
from tests.data.conftest import png
from tests.serve.test_chat import picture, user

NEW_TOKENS = 10
MESSAGES = [user(picture(png(seed=0)), "what is it?")]


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def expected(generator):
    prompt = generator.encode_turns(["<image>\nwhat is it?"])
    return generator.generate([Request(prompt, [png(seed=0)])], SamplingOptions(NEW_TOKENS))[0]


def create(client, **fields):
    return client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, "max_tokens": NEW_TOKENS, **fields})


def test_an_answer_is_whole_in_openais_schema(client, expected):
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=MESSAGES, max_tokens=NEW_TOKENS)
    answer = ChatCompletion.model_validate_json(raw.text, strict=True)
    assert (answer.object, answer.model, len(answer.choices)) == ("chat.completion", "tiny", 1)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert (choice.finish_reason, choice.logprobs) == (expected.finish_reason, None)
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(expected.tokens)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": ""},
        {"max_completion_tokens": NEW_TOKENS},
        {"temperature": 0.0, "top_p": 0.5, "extra_body": {"top_k": 3}},
        {"seed": 5},
        {"stop": []},
        {"stop": ["\u0000never"]},
        {"n": 1},
        {"response_format": {"type": "text"}},
        {"tool_choice": "none"},
        {"modalities": ["text"]},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": []},
        {"extra_body": {"repetition_penalty": 1.0, "best_of": 1, "min_p": 0, "ignore_eos": False, "min_tokens": 0}},
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": False},
    ],
)
def test_fields_that_are_done_or_change_nothing(client, expected, fields):
    assert create(client, **fields).choices[0].message.content == expected.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frequency_penalty", 1.0), ("presence_penalty", -1.0), ("repetition_penalty", 1.1), ("logit_bias", {"5": 10}),
        ("min_p", 0.1), ("min_tokens", 3), ("ignore_eos", True), ("best_of", 2), ("guided_json", {"type": "object"}),
        ("guided_regex", "a+"), ("guided_choice", ["a"]), ("guided_grammar", "a"), ("structured_outputs", {"json": {}}),
        ("stop_token_ids", [1]), ("bad_words", ["a"]), ("echo", True), ("suffix", "x"), ("tool_choice", "required"),
        ("tools", [{"type": "function", "function": {"name": "f"}}]), ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}), ("modalities", ["text", "audio"]), ("n", 9), ("n", 0),
        ("prediction", {"type": "content", "content": "a"}), ("audio", {"voice": "a", "format": "wav"}),
        ("web_search_options", {"x": 1}), ("top_logprobs", 3), ("max_tokens", 0), ("stop", ["a"] * 5),
        ("stop", ["a" * 257]),
    ],
)  # fmt: skip
def test_what_would_change_the_reply_and_is_not_done_is_refused_by_name(client, name, value):
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, extra_body={name: value})
    assert caught.value.param == name
    assert name in str(caught.value)


def test_other_errors_are_objects_of_openais_kinds(client, url):
    with pytest.raises(openai.NotFoundError) as caught:
        create(client, model="gpt-4o")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4o")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="there is no '/v1/embeddings' here"):
        client.embeddings.create(model="tiny", input="a")
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, messages=[{"role": "user", "content": "a " * 300}])
    assert caught.value.code == "context_length_exceeded"


def test_models_are_listed_and_retrieved(client):
    (listed,) = client.models.list().data
    found = client.models.retrieve(listed.id)
    assert found == listed
    assert (found.id, found.object, found.owned_by) == ("tiny", "model", "oq2vl_jax")
    assert found.created > 1e9


def test_a_stream_is_the_same_reply_with_usage_at_its_end(client, expected):
    chunks = list(create(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == expected.finish_reason
    assert chunks[-1].usage.completion_tokens == len(expected.tokens)
    assert len({chunk.id for chunk in chunks}) == 1


def test_eight_choices_of_one_request_differ_by_their_seeds(client):
    def texts(**fields):
        return [choice.message.content for choice in create(client, temperature=1.0, seed=3, **fields).choices]

    eight = texts(n=8)
    assert len(set(eight)) > 4
    assert eight[:2] == texts(n=2)


def reference_scores(generator, reply):
    """log_softmax of a whole forward pass over the prompt and each beginning of the reply."""
    prompt = generator.encode_turns(["<image>\nwhat is it?"])
    rows = []
    for i in range(len(reply.tokens)):
        logits, _, _ = generator.prefill([Request(prompt + reply.tokens[:i], [png(seed=0)])], num_new=1)
        rows.append(np.asarray(jax.nn.log_softmax(logits[0].astype("float32"))))
    return np.stack(rows)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_the_models_own(client, generator, temperature):
    fields = {"logprobs": True, "top_logprobs": 4, "temperature": temperature, "seed": 1}
    choice = create(client, **fields).choices[0]
    content = choice.logprobs.content
    prompt = generator.encode_turns(["<image>\nwhat is it?"])
    options = SamplingOptions(NEW_TOKENS, temperature=temperature, seed=1)
    reply = generator.generate([Request(prompt, [png(seed=0)])], options)[0]
    assert [entry.bytes for entry in content] == [list(generator.codec.token_bytes(token)) for token in reply.tokens]
    written = b"".join(bytes(entry.bytes) for entry in content if not entry.token.startswith("<|"))  # specials are not
    assert written.decode(errors="replace") == choice.message.content
    expected = reference_scores(generator, reply)
    chosen = expected[np.arange(len(reply.tokens)), reply.tokens]
    errors = [np.abs(chosen - [entry.logprob for entry in content]).max()]
    best = -np.sort(-expected, axis=-1)[:, :4]
    errors.append(np.abs(best - [[other.logprob for other in entry.top_logprobs] for entry in content]).max())
    print(f"largest error of a log-probability: {max(errors):.1e}")
    assert max(errors) < 1e-4  # measured 1e-6 to 2e-6
    streamed = list(create(client, stream=True, **fields))
    pieces = [chunk.choices[0].logprobs for chunk in streamed]
    assert [entry for piece in pieces if piece for entry in piece.content] == content


def test_a_key_is_asked_for_in_openais_way(generator):
    engine = Engine(generator, num_rows=1, max_context=128, max_waiting=1)
    admission = Admission.of("127.0.0.1", (), (), "secret")
    app = Server(engine, "tiny", 10**6, 10**6, None, admission).app()

    async def models(key):
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app))
        client = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key=key, http_client=http, max_retries=0)
        return [model.id async for model in client.models.list()]

    assert asyncio.run(models("secret")) == ["tiny"]
    with pytest.raises(openai.AuthenticationError) as caught:
        asyncio.run(models("other"))
    assert caught.value.code == "invalid_api_key"
