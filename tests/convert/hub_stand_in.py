"""A stand-in of the Hugging Face hub: the few requests that huggingface_hub makes to push a folder and to fetch it.

It holds repositories in memory, answers every file as a regular one (no LFS), and can be told to fail.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

TOKEN = "hf_of_the_stand_in"
COMMIT = "0" * 39 + "1"


class StandIn(ThreadingHTTPServer):
    """files: {"ORG/NAME": {path: content}}; private: names; failing: status of every answer, or "drop"."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.failing: int | str | None = None
        self.fails_from = "/"
        self.paths: list[str] = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_):
        pass

    def answer(self, body=b"", status=200, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (
            {"Content-Length": str(len(content)), "Content-Type": "application/json"} | headers
        ).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_one(self):
        path, server = unquote(urlparse(self.path).path), self.server
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.paths.append(f"{self.command} {path}")
        if server.failing is not None and path.startswith(server.fails_from):
            if server.failing == "drop":
                self.connection.close()
                return
            self.answer({"error": "as asked"}, int(server.failing))
        elif path == "/api/whoami-v2":
            is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self.answer(
                {"name": "me", "type": "user"} if is_known else {"error": "bad token"}, 200 if is_known else 401
            )
        elif path == "/api/repos/create":
            self.create(json.loads(content))
        elif path == "/api/validate-yaml":  # the front matter of README.md
            self.answer({"errors": [], "warnings": []})
        elif path.startswith("/api/models/"):
            self.of_model(path.removeprefix("/api/models/").split("/"), content)
        elif "/resolve/" in path:
            self.resolve(path[1:])
        else:
            self.answer({"error": path}, 404)

    do_GET = do_POST = do_HEAD = handle_one  # noqa: N815

    def create(self, asked):
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        self.server.files.setdefault(name, {})
        if asked.get("private") or asked.get("visibility") == "private":
            self.server.private.add(name)
        self.answer({"url": f"{self.server.url}/{name}"})

    def of_model(self, parts, content):
        name, action = "/".join(parts[:2]), parts[2] if len(parts) > 2 else ""
        if name not in self.server.files:
            self.answer({"error": "no such repository"}, 404, X_Error_Code="RepoNotFound")
        elif action == "preupload":
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for one in json.loads(content)["files"]
            ]
            self.answer({"files": files})
        elif action == "commit":
            lines = [json.loads(line) for line in content.splitlines()]
            added = {line["value"]["path"]: line["value"] for line in lines if line["key"] == "file"}
            for line in lines:
                if line["key"] == "deletedFile":
                    del self.server.files[name][line["value"]["path"]]
            self.server.files[name] |= {path: base64.b64decode(value["content"]) for path, value in added.items()}
            self.answer(
                {"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            )
        elif action == "tree":
            self.answer([
                {"type": "file", "path": path, "size": len(file), "oid": hashlib.sha1(file).hexdigest()}
                for path, file in self.server.files[name].items()
            ])  # fmt: skip
        else:
            siblings = [{"rfilename": path} for path in self.server.files[name]]
            self.answer(
                {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            )

    def resolve(self, path):
        name, _, rest = path.partition("/resolve/")
        file = self.server.files.get(name, {}).get(rest.split("/", 1)[1])
        if file is None:
            self.answer({"error": "no such file"}, 404, X_Error_Code="EntryNotFound")
            return
        self.answer(file, ETag=f'"{hashlib.sha1(file).hexdigest()}"', X_Repo_Commit=COMMIT)


@contextmanager
def stand_in():
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
