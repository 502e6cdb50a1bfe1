"""Checks Host, Origin, content type and API key of a request before its body is read.

A server bound to loopback is reachable only from this machine, yet any web page in a browser on this machine can send
requests to it: under a host name of its own that resolves to 127.0.0.1 (DNS rebinding, detected by the Host header), or
as a cross-site request (detected by the Origin header and the content type).
"""

import hmac
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from oq2vl_jax.serve.answers import error_response

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Admission(NamedTuple):
    """Rules for admitting requests. hosts: names accepted in the Host header, None for any. origins: other sites whose
    pages may send requests, "*" for any. key: the API key that clients must send, None for no check."""

    hosts: frozenset[str] | None
    origins: frozenset[str]
    key: str | None

    @staticmethod
    def of(bound_to: str, hosts: tuple[str, ...], origins: tuple[str, ...], key: str | None) -> "Admission":
        named = {host.lower() for host in hosts}
        names = named | {*LOOPBACK, bound_to.lower()} if named or bound_to in LOOPBACK else None
        return Admission(frozenset(names) if names else None, frozenset(origins), key)


class Gate:
    """ASGI middleware that refuses requests that are not admitted."""

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
        """Returns (message, status, code) for a request to refuse, None for one to admit."""
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
    """Removes the port: 'localhost:8000' -> 'localhost', '[::1]:8000' -> '::1'."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
