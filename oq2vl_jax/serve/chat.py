"""The OpenAI chat-completions format: a request's JSON to a prompt with images, a reply to JSON.

What is understood: messages (system, user, assistant; text and image_url parts), max_tokens or max_completion_tokens,
temperature (default 0, not 1: the reply of an evaluation), top_p, top_k, seed, stop, stream, stream_options. n other
than 1, tools and logprobs are refused; other fields are ignored, as clients send many.
"""

import base64
import binascii
import json
import random
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from oq2vl_jax.data.images import ImageError, check_image
from oq2vl_jax.data.text import IMAGE, IMAGE_IN_TEXT
from oq2vl_jax.eval.generator import Generator, Request
from oq2vl_jax.eval.reply import Reply, SamplingOptions

DEFAULT_NEW_TOKENS = 512
MAX_IMAGES = 32
MAX_STOPS = 16
REFUSED_FIELDS = ("tools", "functions", "logprobs", "top_logprobs", "response_format", "audio")


class RequestError(Exception):
    """What a client did wrong: one sentence, and the HTTP status."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class ChatRequest(NamedTuple):
    request: Request
    options: SamplingOptions
    model: str
    is_stream: bool
    includes_usage: bool


def parse_request(
    body: bytes, generator: Generator, max_context: int, files_root: Path | None, model_name: str = "oq2vl_jax"
) -> ChatRequest:
    """Raises RequestError. Images are checked to decode; local ones only below files_root."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError("the body must be a JSON object")
    refused = [name for name in REFUSED_FIELDS if fields.get(name)]
    if refused == ["response_format"] and fields["response_format"] == {"type": "text"}:
        refused = []
    if refused or fields.get("n") not in (None, 1):
        raise RequestError(f"{refused[0] if refused else 'n other than 1'} is not supported")
    turns, system, images = read_messages(fields.get("messages"), files_root)
    prompt = generator.encode_turns(turns, system)
    room = max_context - len(prompt)
    if room < 1:
        raise RequestError(
            f"the messages are {len(prompt)} tokens with {len(images)} images of "
            f"{generator.model_config.num_visual_tokens}; this server takes {max_context} with the reply"
        )
    stream_options = fields.get("stream_options")
    return ChatRequest(
        Request(prompt, images),
        read_options(fields, room),
        str(fields.get("model") or model_name).encode("utf-8", "replace").decode(),
        bool(fields.get("stream")),
        isinstance(stream_options, dict) and bool(stream_options.get("include_usage")),
    )


def read_options(fields: dict[str, Any], room: int) -> SamplingOptions:
    """room: tokens left for the reply."""
    wanted = fields.get("max_completion_tokens") or fields.get("max_tokens") or min(DEFAULT_NEW_TOKENS, room)
    stop = fields.get("stop") or ()
    if not isinstance(stop, str | list | tuple) or (len(stop) > MAX_STOPS and not isinstance(stop, str)):
        raise RequestError(f"stop must be a text or a list of at most {MAX_STOPS}")
    try:
        temperature = float(fields.get("temperature") or 0)
        seed = fields.get("seed")
        return SamplingOptions(
            max_new_tokens=min(int(wanted), room),
            temperature=temperature,
            top_p=float(1 if fields.get("top_p") is None else fields["top_p"]),
            top_k=max(0, int(fields.get("top_k") or 0)),
            seed=random.randrange(2**31) if seed is None else int(seed) % 2**31,
            stop=(stop,) if isinstance(stop, str) else tuple(str(text) for text in stop),
        )
    except (TypeError, ValueError, OverflowError) as error:  # UserError among them
        raise RequestError(str(error)) from error


def read_messages(messages: Any, files_root: Path | None) -> tuple[list[str], str | None, list[bytes]]:
    """(turns with <image> where pictures stand, human first and last; system message; pictures in order)."""
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of at least one message")
    num_images = sum(count_images(message) for message in messages)
    if num_images > MAX_IMAGES:  # before the first is decoded
        raise RequestError(f"{num_images} images, at most {MAX_IMAGES}")
    system, turns, images = None, [], []
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "developer", "user", "assistant"):
            raise RequestError(f"message {i}: role must be system, user or assistant")
        text, pictures = read_content(message.get("content"), i, files_root)
        if role in ("system", "developer"):
            if i > 0 or pictures:
                raise RequestError(f"message {i}: a system message comes first and has no images")
            system = text
            continue
        if role == "assistant" and pictures:
            raise RequestError(f"message {i}: images belong to user messages")
        if role == "assistant" and not turns:
            raise RequestError(f"message {i}: the conversation starts with the assistant; the user speaks first")
        if (role == "user") == (len(turns) % 2 == 0):
            turns.append(text)
        else:  # the same role again
            turns[-1] += f"\n{text}"
        images += pictures
    if len(turns) % 2 == 0:
        raise RequestError("the last message must be the user's")
    return turns, system, images


def count_images(message: Any) -> int:
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else []
    return sum(isinstance(part, dict) and part.get("type") == "image_url" for part in parts)


def read_content(content: Any, i: int, files_root: Path | None) -> tuple[str, list[bytes]]:
    """Text with <image> in place of the pictures; a marker that the client wrote as text is none."""
    if content is None:
        return "", []
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RequestError(f"message {i}: content must be text or a list of parts")
    text, images = "", []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"].replace(IMAGE, IMAGE_IN_TEXT)
        elif kind == "image_url":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            if not isinstance(url, str):
                raise RequestError(f"message {i}: image_url needs a url")
            images.append(read_image(url, f"message {i}", files_root))
            text += f"{IMAGE}\n"
        else:
            problem = "the text of a text part must be a string" if kind == "text" else None
            raise RequestError(f"message {i}: {problem or f'parts are text or image_url, got {str(kind)[:40]!r}'}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"message {i}: text that is no UTF-8 (a lone surrogate)") from error
    return text, images


def read_image(url: str, where: str, files_root: Path | None) -> bytes:
    """The bytes of a data URL, or of a local file where the server allows it; they decode."""
    if url.startswith("data:"):
        head, comma, payload = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RequestError(f"{where}: a data URL must be data:image/...;base64,...")
        try:
            data = base64.b64decode(payload, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"{where}: the image's base64 is broken: {error}") from error
    elif url.startswith("file://") or "://" not in url:
        data = read_local_image(url, where, files_root)
    else:
        raise RequestError(f"{where}: {url.partition('://')[0][:20]} images are not fetched; send a data URL")
    try:
        check_image(data)
    except ImageError as problem:
        raise RequestError(f"{where}: the image cannot be used: {problem}") from problem
    return data


def read_local_image(url: str, where: str, files_root: Path | None) -> bytes:
    path = Path(unquote(url.removeprefix("file://")))
    if files_root is None:
        raise RequestError(f"{where}: local files are not served here (--allow-files DIR allows a folder)")
    try:
        resolved = (files_root / path).resolve()
        if resolved.is_relative_to(files_root.resolve()) and resolved.is_file():
            return resolved.read_bytes()
    except (ValueError, OSError):  # names no file can have: too long, with a NUL
        pass
    raise RequestError(f"{where}: no such file below the folder that is served")


def completion(chat: ChatRequest, reply: Reply, identity: str) -> dict[str, Any]:
    """The answer to a request that does not stream."""
    message = {"role": "assistant", "content": reply.text}
    return {
        **head(chat, identity, "chat.completion"),
        "choices": [{"index": 0, "message": message, "finish_reason": reply.finish_reason}],
        "usage": usage(chat, len(reply.tokens)),
    }


def chunk(chat: ChatRequest, identity: str, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    """One event of a stream."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {**head(chat, identity, "chat.completion.chunk"), "choices": [choice]}


def usage_chunk(chat: ChatRequest, identity: str, num_tokens: int) -> dict[str, Any]:
    return {**head(chat, identity, "chat.completion.chunk"), "choices": [], "usage": usage(chat, num_tokens)}


def head(chat: ChatRequest, identity: str, kind: str) -> dict[str, Any]:
    return {"id": identity, "object": kind, "created": int(time.time()), "model": chat.model}


def usage(chat: ChatRequest, num_tokens: int) -> dict[str, int]:
    prompt_tokens = len(chat.request.prompt)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": prompt_tokens + num_tokens,
    }


def new_identity() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def error_body(message: str, status: int) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status}}
