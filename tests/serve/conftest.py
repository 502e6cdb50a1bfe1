"""A server with a random tiny checkpoint, in this process."""

import socket
import threading

import pytest
import uvicorn

from oq2vl_jax.generate.generator import Generator
from oq2vl_jax.serve.app import Server
from oq2vl_jax.serve.engine import Engine
from tests.generate.conftest import checkpoint  # noqa: F401

MIB = 2**20


@pytest.fixture(scope="session")
def generator(checkpoint):  # noqa: F811
    return Generator(checkpoint)


@pytest.fixture(scope="session")
def url(generator):
    """Of a server that calls its model "tiny"."""
    engine = Engine(generator, num_rows=8, max_context=128, max_waiting=200)
    app = Server(engine, "tiny", 20 * MIB, 256 * MIB, None).app()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        threading.Event().wait(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(20)
    assert not engine.is_alive
