"""An S3 endpoint on this machine: moto's server, behind a door that fails, lags or closes on demand.

Commands find it by the environment that `environment` returns, as they would find a real store.
"""

import contextlib
import http.client
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUCKET = "bucket"


class Door:
    """What the endpoint does to requests. fail_every: answers each n-th with 503; lag: seconds before an answer;
    is_closed: connections are dropped; status: answer all with this."""

    def __init__(self, host: str, port: int):
        self.fail_every, self.lag, self.is_closed, self.status = 0, 0.0, False, None
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        door = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self):
                size = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(size) if size else None
                with door._lock:
                    door.counts["requests"] += 1
                    is_nth = door.fail_every and door.counts["requests"] % door.fail_every == 0
                time.sleep(door.lag)
                if door.is_closed:
                    door.counts["dropped"] += 1
                    self.close_connection = True
                    return
                if is_nth or door.status is not None:
                    door.counts["failed"] += 1
                    code = "SlowDown" if door.status is None else "AccessDenied" if door.status == 403 else "Refused"
                    self.answer(door.status or 503, {}, f"<Error><Code>{code}</Code></Error>".encode())
                    return
                backend = http.client.HTTPConnection(host, port, timeout=60)
                backend.request(self.command, self.path, body, dict(self.headers))
                found = backend.getresponse()
                content = found.read()
                self.answer(found.status, dict(found.getheaders()), content)
                backend.close()

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward  # noqa: N815

            def answer(self, status, headers, content):
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("connection", "transfer-encoding", "date", "server"):
                        self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.fail_every, self.lag, self.is_closed, self.status = 0, 0.0, False, None
        self.counts.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def endpoint() -> Iterator[Door]:
    """Starts the store with an empty bucket."""
    import logging

    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    store = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1",
                         aws_access_key_id="k", aws_secret_access_key="s")  # fmt: skip
    store.create_bucket(Bucket=BUCKET)
    door = Door(host, port)
    try:
        yield door
    finally:
        door.close()
        server.stop()


def environment(door: Door, cache: str, patience: float = 60.0) -> dict[str, str]:
    """Returns the variables of a command that uses the endpoint and a cache folder."""
    return os.environ | {
        "AWS_ENDPOINT_URL": door.url, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "OQ2VL_JAX_CACHE": cache,
        "OQ2VL_JAX_PATIENCE_SECONDS": str(patience),
    }  # fmt: skip
