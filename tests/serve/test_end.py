"""The command as a process: signals, half-sent requests, OpenAI's objects."""

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
import uvicorn

from tests.xla_flags import FAST_COMPILING

ONE_DEVICE = os.environ | {"XLA_FLAGS": FAST_COMPILING}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def call(port, path, body=None, timeout=120):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
def server(checkpoint):
    """(process, port) of a server of two rows that takes long replies."""
    with started(checkpoint, 2) as found:
        yield found


@contextlib.contextmanager
def started(checkpoint, num_rows):
    port = free_port()
    command = [sys.executable, "-m", "oq2vl_jax.serve", "--checkpoint", checkpoint, "--port", str(port),
               "--batch-size", str(num_rows), "--max-context", "2048"]  # fmt: skip
    process = subprocess.Popen(command, env=ONE_DEVICE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(240):
        try:
            call(port, "/health")
            break
        except OSError:
            time.sleep(0.25)
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()


def question(num_tokens, **fields):
    return {"messages": [{"role": "user", "content": "hi"}], "max_tokens": num_tokens, "temperature": 1.0, **fields}


def end(process, port, num_requests):
    """(answered whole, refused) of so many requests, half of them streams, when SIGTERM comes a second later."""
    call(port, "/v1/chat/completions", question(2))
    with concurrent.futures.ThreadPoolExecutor(256) as pool:
        asked = [
            pool.submit(call, port, "/v1/chat/completions", question(400, stream=i % 2 == 1))
            for i in range(num_requests)
        ]
        time.sleep(1.0 if num_requests else 0)
        process.send_signal(signal.SIGTERM)
        found = [answer.result() for answer in asked]
    assert process.wait(120) == 0
    assert "Traceback" not in process.stderr.read()
    whole = [text for status, text in found if status == 200 and ("[DONE]" in text or '"usage"' in text)]
    refused = [text for status, text in found if status == 503 or (status == 200 and "shutting down" in text)]
    print(f"{len(whole)} answered, {len(refused)} refused")
    assert len(whole) + len(refused) == num_requests
    return len(whole), len(refused)


@pytest.mark.slow
@pytest.mark.parametrize("num_requests", [0, 8, 230])
def test_every_request_is_answered_or_refused_at_the_end(server, num_requests):
    end(*server, num_requests)


def test_objects_are_openais_and_sigterm_ends_what_runs_and_refuses_what_waits(server):
    process, port = server
    for path, status, code in (("/v1/models/other", 404, "model_not_found"), ("/v1/nothing", 404, None)):
        found = call(port, path)
        assert found[0] == status
        assert json.loads(found[1])["error"]["code"] == code
    listed = json.loads(call(port, "/v1/models")[1])["data"][0]
    assert json.loads(call(port, f"/v1/models/{listed['id']}")[1]) == listed
    assert {"id", "object", "created", "owned_by"} == set(listed)
    assert call(port, "/v1/chat/completions", question(2, model="gpt-4"))[0] == 404
    answer = json.loads(call(port, "/v1/chat/completions", question(3, n=3, model=listed["id"], seed=1))[1])
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert "oq2vl_requests_total" in call(port, "/metrics")[1]
    assert json.loads(call(port, "/version")[1])["version"]
    num_whole, num_refused = end(process, port, 38)
    assert num_whole
    assert num_refused


def test_half_sent_requests_are_closed(checkpoint, monkeypatch):
    from oq2vl_jax.generate.generator import Generator
    from oq2vl_jax.serve import app, http
    from oq2vl_jax.serve.engine import Engine

    monkeypatch.setattr(app, "SECONDS_TO_SEND", 1)
    monkeypatch.setattr(http, "SECONDS_FOR_HEADERS", 1)
    port = free_port()
    served = app.Server(Engine(Generator(checkpoint), 2, 64, 8), "tiny", 2**20, 2**20, None).app()
    server = uvicorn.Server(uvicorn.Config(served, port=port, log_level="warning", http=http.TimedProtocol))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1"
    rest = b"\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{"
    for content, expected in ((head, b""), (head + rest, b"408"), (b"", b"")):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(content)
            connection.settimeout(20)
            assert expected in connection.recv(4096)
    server.should_exit = True
    thread.join(20)
