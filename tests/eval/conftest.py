"""The checkpoint of the tests of generate."""

from tests.generate.conftest import checkpoint  # noqa: F401
