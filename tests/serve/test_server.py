"""The server under load: right answers to the right clients, whatever some of them do."""

import asyncio
import json
import resource
import threading
import time

import httpx
import pytest

from oq2vl_jax.generate.generator import Request
from oq2vl_jax.generate.reply import SamplingOptions
from oq2vl_jax.serve import body_readers
from oq2vl_jax.serve.answers import RequestError
from oq2vl_jax.serve.body import Limits
from oq2vl_jax.serve.engine import Engine
from tests.data.conftest import png
from tests.serve.test_chat import data_url, picture, user

NUM_CLIENTS = 64
JSON = {"content-type": "application/json"}
NEW_TOKENS = 12
MIB = 2**20
MAX_GROWTH_MIB = 700  # measured 160; 64 bodies of 30 MiB would be 1,900


def question(i):
    return user(picture(png(seed=i % 5)), f"client {i}")


def payload(i, **fields):
    return {"messages": [question(i)], "max_tokens": NEW_TOKENS, "temperature": 0.8 * (i % 2), "seed": i, **fields}


@pytest.fixture(scope="module")
def expected(generator):
    """What every client would get alone."""
    replies = []
    for i in range(NUM_CLIENTS):
        prompt = generator.encode_turns([f"<image>\nclient {i}"])
        options = SamplingOptions(NEW_TOKENS, temperature=0.8 * (i % 2), seed=i)
        replies.append(generator.generate([Request(prompt, [png(seed=i % 5)])], options)[0])
    return replies


async def ask(client, url, i):
    response = await client.post(f"{url}/v1/chat/completions", json=payload(i))
    assert response.status_code == 200, response.text
    return response.json()


async def stream(client, url, i, delay=0.0, leave_after=None):
    """The text of a streamed reply; reads slowly, or leaves in the middle."""
    text, num_events = "", 0
    async with client.stream("POST", f"{url}/v1/chat/completions", json=payload(i, stream=True)) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            num_events += 1
            if leave_after is not None and num_events > leave_after:
                return None
            text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
            await asyncio.sleep(delay)
    return text


async def broken(client, url):
    message = user({"type": "image_url", "image_url": {"url": data_url(b"no picture")}}, "what?")
    return (await client.post(f"{url}/v1/chat/completions", json={"messages": [message]})).status_code


async def large(client, url, declares_size):
    content = b'{"messages": "' + b"x" * (30 * MIB) + b'"}'

    async def parts():
        for start in range(0, len(content), MIB):
            yield content[start : start + MIB]

    try:
        body = content if declares_size else parts()
        return (await client.post(f"{url}/v1/chat/completions", content=body, headers=JSON)).status_code
    except httpx.TransportError:  # the server hung up on the rest of the body
        return 413


async def watch_health(client, url, stop):
    longest = 0.0
    while not stop.is_set():
        start = asyncio.get_running_loop().time()
        response = await client.get(f"{url}/health")
        assert response.json()["status"] == "ok"
        longest = max(longest, asyncio.get_running_loop().time() - start)
        await asyncio.sleep(0.05)
    return longest


async def everything_at_once(url):
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        stop = asyncio.Event()
        health = asyncio.create_task(watch_health(client, url, stop))
        whole = [ask(client, url, i) for i in range(0, NUM_CLIENTS, 2)]
        streams = [stream(client, url, i, delay=0.1 * (i % 4 == 1)) for i in range(1, NUM_CLIENTS, 2)]
        leaving = [stream(client, url, i, leave_after=1) for i in range(8)]
        others = [broken(client, url) for _ in range(8)] + [large(client, url, i % 2 == 0) for i in range(8)]
        groups = [asyncio.gather(*group) for group in (whole, streams, leaving, others)]
        results = await asyncio.gather(*groups)
        stop.set()
        return results, await health


def test_64_clients_with_slow_and_broken_and_leaving_ones_among_them(url, expected):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (whole, streams, leaving, others), longest_health = asyncio.run(everything_at_once(url))
    for i, answer in zip(range(0, NUM_CLIENTS, 2), whole, strict=True):
        choice = answer["choices"][0]
        assert choice["message"]["content"] == expected[i].text, f"client {i} got another's answer"
        assert choice["finish_reason"] == expected[i].finish_reason
        assert answer["usage"]["completion_tokens"] == len(expected[i].tokens)
    assert streams == [expected[i].text for i in range(1, NUM_CLIENTS, 2)]
    assert leaving == [None] * 8
    assert others == [400] * 8 + [413] * 8
    assert longest_health < 20, "parsing and decoding must not stop the loop"  # measured 2 on a busy machine
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert growth < MAX_GROWTH_MIB
    deadline = time.monotonic() + 20  # a row whose reader has left is freed at the next piece
    while time.monotonic() < deadline:
        health = httpx.get(f"{url}/health").json()
        if (health["running"], health["waiting"]) == (0, 0):
            break
        time.sleep(0.1)
    assert (health["running"], health["waiting"]) == (0, 0), "nothing is left over"


def test_models_page_and_unknown_paths(url):
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "tiny"
    page = httpx.get(url)
    assert page.headers["content-type"].startswith("text/html")
    assert "Ask about a picture" in page.text
    assert httpx.get(f"{url}/v1/nothing").status_code == 404
    refused = httpx.post(f"{url}/v1/chat/completions", json={"messages": []})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith("messages must be a list")


def test_usage_ends_a_stream_where_it_is_asked_for(url, expected):
    fields = payload(4, stream=True, stream_options={"include_usage": True})
    lines = httpx.post(f"{url}/v1/chat/completions", json=fields, timeout=60).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2][6:])["usage"]["completion_tokens"] == len(expected[4].tokens)
    assert json.loads(lines[-3][6:])["choices"][0]["finish_reason"] == expected[4].finish_reason


def test_too_many_waiting_requests_are_told_so(generator):
    from oq2vl_jax.serve.engine import EngineFullError, Job

    engine = Engine(generator, 1, 128, max_waiting=2)
    job = Job(Request([1], []), SamplingOptions(2), lambda event: None)
    engine.submit(job)
    engine.submit(job)
    with pytest.raises(EngineFullError):
        engine.submit(job)


def test_a_prompt_as_long_as_the_context_allows_is_answered(generator):
    """Its padding would be longer than the cache."""
    from oq2vl_jax.serve.engine import Job

    request = Request(generator.encode_turns(["x" * 20]), [])
    context = len(request.prompt) + 4
    engine = Engine(generator, 2, context, max_waiting=4)
    done, events = threading.Semaphore(0), []

    def listen(event):
        events.append(event)
        if event.reply or event.error:
            done.release()

    engine.start()
    engine.submit(Job(request, SamplingOptions(4), listen))
    assert done.acquire(timeout=60)
    engine.close()
    assert events[-1].reply == generator.generate([request], SamplingOptions(4))[0]


def test_the_row_of_a_reader_who_left_is_freed_before_its_reply_ends(generator):
    from oq2vl_jax.serve.engine import Job

    engine = Engine(generator, 1, 128, max_waiting=4)
    request = Request(generator.encode_turns(["hi"]), [])
    events, done = {"gone": [], "next": []}, threading.Event()

    def leave(event):
        events["gone"].append(event)
        engine.cancel(gone)

    def listen(event):
        events["next"].append(event)
        if event.reply or event.error:
            done.set()

    gone = Job(request, SamplingOptions(80, temperature=1.0, seed=3), leave)
    engine.start()
    engine.submit(gone)
    engine.submit(Job(request, SamplingOptions(4), listen))
    assert done.wait(60)
    engine.close()
    assert events["gone"], "it had begun"
    assert all(event.reply is None for event in events["gone"]), "and was not written to its end"
    assert events["next"][-1].reply == generator.generate([request], SamplingOptions(4))[0]


def test_a_failure_of_the_device_is_told_and_survived(generator, monkeypatch):
    from oq2vl_jax.serve import engine as engine_module
    from oq2vl_jax.serve.engine import Job

    real, calls = engine_module.decode, []

    def fails_once(*args):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return real(*args)

    monkeypatch.setattr(engine_module, "decode", fails_once)
    engine = Engine(generator, 2, 128, max_waiting=4)
    done, events = threading.Semaphore(0), []

    def listen(event):
        events.append(event)
        if event.reply or event.error:
            done.release()

    engine.start()
    request = Request(generator.encode_turns(["hi"]), [])
    for _ in range(2):
        engine.submit(Job(request, SamplingOptions(6), listen))
        assert done.acquire(timeout=60)
    engine.close()
    assert "failed" in next(event.error for event in events if event.error)
    assert events[-1].reply == generator.generate([request], SamplingOptions(6))[0]


def test_a_large_body_is_read_in_another_process_and_answered_the_same(url, expected, tmp_path):
    blanks = {**payload(4), "user": "x" * 3 * MIB}
    answer = httpx.post(f"{url}/v1/chat/completions", json=blanks, timeout=60).json()
    assert answer["choices"][0]["message"]["content"] == expected[4].text
    refused = httpx.post(f"{url}/v1/chat/completions", json={**blanks, "model": "other"}, timeout=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


def test_a_large_body_that_finds_no_room_is_told_so(url, monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(body_readers.tempfile, "NamedTemporaryFile", full)
    answer = httpx.post(f"{url}/v1/chat/completions", json={**payload(4), "user": "x" * 3 * MIB}, timeout=60)
    assert (answer.status_code, "No space left" in answer.text) == (503, True)


def test_a_reader_that_is_killed_is_replaced(tmp_path):
    readers, file = body_readers.BodyReaders(), tmp_path / "body"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    limits = Limits(128, None, "tiny")
    assert readers.read(str(file), limits).turns == ["hi"]
    for process in readers._pool._processes.values():
        process.kill()
        process.join()
    with pytest.raises(RequestError, match="ended; send it again"):
        readers.read(str(file), limits)
    assert readers.read(str(file), limits).turns == ["hi"]
    readers.close()
