"""A server with a random tiny checkpoint, in this process."""

from tests.eval.conftest import checkpoint  # noqa: F401
