"""A local stand-in of the Hugging Face hub: one data set, its files listed and read by ranges."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path

COMMIT = "a" * 40


def entries_of(folder: Path) -> list[dict]:
    return [
        {"type": "file", "path": file.name, "size": file.stat().st_size,
         "oid": hashlib.sha1(file.read_bytes()).hexdigest()}
        for file in sorted(folder.iterdir())
    ]  # fmt: skip


@contextlib.contextmanager
def hub(folder: Path, name: str):
    """Serves the files of a folder as the data set `name`; yields (the endpoint, the requests so far)."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, status, body=b"", headers=()):
            self.send_response(status)
            for key, value in headers:
                self.send_header(key, value)
            if "Content-Length" not in dict(headers):
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def answer_json(self, value, status=200):
            self.answer(status, json.dumps(value).encode(), [("Content-Type", "application/json")])

        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked.append(self.path)
            self.answer_json(entries_of(folder))

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            asked.append(self.path)
            path = self.path.split("?")[0]
            if f"/api/datasets/{name}/tree/" in path:
                return self.answer_json(entries_of(folder))
            if path.startswith(f"/api/datasets/{name}"):
                return self.answer_json({"id": name, "sha": COMMIT, "siblings": [], "private": False})
            file = folder / path.rsplit("/", 1)[-1]
            if not path.startswith(f"/datasets/{name}/resolve/") or not file.is_file():
                headers = [("X-Error-Code", "RepoNotFound")]
                return self.answer(404, b"{}", headers)
            content = file.read_bytes()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            headers = [("ETag", f'"{hashlib.sha1(content).hexdigest()}"'), ("X-Repo-Commit", COMMIT)]
            if wanted is None:
                return self.answer(200, content, headers)
            start, stop = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1) + 1
            headers.append(("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}"))
            return self.answer(206, content[start:stop], headers)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
