"""Who may ask a server: names, sites, content types, keys."""

import pytest

from oq2vl_jax.serve.gate import Admission, Gate


def status(admission, path="/v1/chat/completions", method="POST", **headers):
    headers = {"host": "127.0.0.1:8000", "content-type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items() if value is not None]
    refused = Gate(lambda *_: None, admission).refusal({"type": "http", "path": path, "method": method, "headers": raw})
    return refused[1] if refused else 200


LOOPBACK = Admission.of("127.0.0.1", (), (), None)
OPEN = Admission.of("0.0.0.0", (), (), None)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000"])
def test_a_server_on_loopback_is_asked_by_its_own_names(host):
    assert status(LOOPBACK, host=host) == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost.x"])
def test_a_page_that_rebinds_its_name_is_refused(host):
    assert status(LOOPBACK, host=host) == 403
    assert status(OPEN, host=host) == 200
    assert status(Admission.of("0.0.0.0", ("my.host",), (), None), host=host) == 403


def test_other_sites_may_ask_where_they_are_allowed():
    assert status(LOOPBACK, origin="http://evil.example") == 403
    assert status(LOOPBACK, origin="null") == 403
    assert status(LOOPBACK, origin="http://127.0.0.1:8000") == 200
    assert status(LOOPBACK, origin="http://127.0.0.1:9000") == 403
    assert status(Admission.of("127.0.0.1", (), ("https://good.example",), None), origin="https://good.example") == 200
    assert status(Admission.of("127.0.0.1", (), ("*",), None), origin="http://evil.example") == 200


def test_a_post_is_json():
    assert status(LOOPBACK, content_type="text/plain") == 415
    assert status(LOOPBACK, content_type=None) == 415
    assert status(LOOPBACK, content_type="application/json; charset=utf-8") == 200
    assert status(LOOPBACK, "/health", "GET", content_type=None) == 200


def test_a_key_is_asked_for():
    locked = Admission.of("127.0.0.1", (), (), "secret")
    assert status(locked) == 401
    assert status(locked, authorization="Bearer wrong") == 401
    assert status(locked, authorization="Bearer s\u00e9cret") == 401
    assert status(locked, authorization="Basic secret") == 401
    assert status(locked, authorization="Bearer secret") == 200
    assert status(locked, "/metrics", "GET") == 401
    assert status(locked, "/health", "GET") == 200
    assert status(locked, method="OPTIONS") == 200
