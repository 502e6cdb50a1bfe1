"""Answers in OpenAI's form: errors and server-sent events."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response


class RequestError(Exception):
    """What a client did wrong: one sentence, the HTTP status, and OpenAI's code and parameter where there is one."""

    def __init__(self, message: str, status: int = 400, code: str | None = None, parameter: str | None = None):
        super().__init__(message, status, code, parameter)  # all of it, for the way between processes
        self.status, self.code, self.parameter = status, code, parameter

    def __str__(self) -> str:
        return self.args[0]


def error_body(
    message: str, status: int, code: str | None = None, parameter: str | None = None
) -> dict[str, dict[str, Any]]:
    """OpenAI's error object; its clients take the status from HTTP, and `code` as a word."""
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
    """One server-sent event."""
    return f"data: {json.dumps(value)}\n\n"
