"""Formats errors and server-sent events in OpenAI's form."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response


class RequestError(Exception):
    """A request that is refused: a message of one sentence, the HTTP status, and OpenAI's code and parameter if any."""

    def __init__(self, message: str, status: int = 400, code: str | None = None, parameter: str | None = None):
        super().__init__(message, status, code, parameter)  # all arguments, for pickling between processes
        self.status, self.code, self.parameter = status, code, parameter

    def __str__(self) -> str:
        return self.args[0]


def error_body(
    message: str, status: int, code: str | None = None, parameter: str | None = None
) -> dict[str, dict[str, Any]]:
    """Builds OpenAI's error object. Its clients take the status from HTTP and expect `code` to be a word or null."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


def error_response(
    message: str,
    status: int,
    code: str | None = None,
    parameter: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    return JSONResponse(error_body(message, status, code, parameter), status, headers)


def event(value: dict[str, Any]) -> str:
    """Formats one server-sent event."""
    return f"data: {json.dumps(value)}\n\n"
