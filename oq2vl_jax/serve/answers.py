"""Answers in OpenAI's form: error objects and server-sent events."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response


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
