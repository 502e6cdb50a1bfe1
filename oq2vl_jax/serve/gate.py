"""Who may ask: Host, Origin, content type and key are looked at before anything of a request is read.

Bound to loopback, a server is asked by this machine alone, and yet any web page that a browser here shows can send to
it: under a name of its own that it lets point to 127.0.0.1 (the Host header tells), or as a cross-site request (the
Origin header and the content type tell).
"""

import hmac
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from oq2vl_jax.serve.answers import error_response

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Admission(NamedTuple):
    """hosts: names by which the server is called, None for any. origins: other sites whose pages may ask, "*" for any.
    key: what clients send as their API key, None for none."""

    hosts: frozenset[str] | None
    origins: frozenset[str]
    key: str | None

    @staticmethod
    def of(bound_to: str, hosts: tuple[str, ...], origins: tuple[str, ...], key: str | None) -> "Admission":
        named = {host.lower() for host in hosts}
        names = named | {*LOOPBACK, bound_to.lower()} if named or bound_to in LOOPBACK else None
        return Admission(frozenset(names) if names else None, frozenset(origins), key)


class Gate:
    """ASGI middleware that answers what is not admitted."""

    def __init__(self, app: ASGIApp, admission: Admission):
        self.app, self.admission = app, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self.refusal(scope) if scope["type"] == "http" else None
        if refused is None:
            await self.app(scope, receive, send)
            return
        message, status, code = refused
        headers = {"www-authenticate": "Bearer"} if status == 401 else None
        await error_response(message, status, code, headers=headers)(scope, receive, send)

    def refusal(self, scope: Scope) -> tuple[str, int, str | None] | None:
        """(sentence, status, code), or None for a request that may go on."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        admission, host, method = self.admission, headers.get("host", ""), scope["method"]
        if admission.hosts is not None and host_name(host) not in admission.hosts:
            return f"the server is not called {host_name(host)[:80]!r}; --allow-host allows a name", 403, None
        origin = headers.get("origin")
        if origin is not None and not admission.origins & {origin, "*"} and urlsplit(origin).netloc != host:
            return f"pages of {origin[:80]!r} may not ask here; --allow-origin allows a site", 403, None
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            return f"the content type must be application/json, got {kind[:40]!r}", 415, None
        is_open = method == "OPTIONS" or not scope["path"].startswith(("/v1", "/metrics"))
        if admission.key is not None and not is_open and not self.has_key(headers.get("authorization", "")):
            return "the API key is missing or wrong", 401, "invalid_api_key"
        return None

    def has_key(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        expected = (self.admission.key or "").encode()
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1", "replace"), expected)


def host_name(host: str) -> str:
    """'localhost:8000' and '[::1]:8000' without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
