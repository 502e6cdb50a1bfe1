"""The OpenAI chat-completions format: a request's JSON to a prompt with images, a reply to JSON.

What is understood: messages (system, user, assistant; text and image_url parts), max_tokens or max_completion_tokens,
temperature (default 0, not 1: the reply of an evaluation), top_p, top_k, seed, stop, n, logprobs, stream. What
would change a reply and is not done is refused by name; other fields are ignored, as clients send many. docs/server.md
has them field by field, and the bounds.
"""

import base64
import binascii
import dataclasses
import json
import random
import re
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from oq2vl_jax.data.images import ImageError, check_image
from oq2vl_jax.data.text import IMAGE, IMAGE_IN_TEXT, TextCodec
from oq2vl_jax.eval.generator import Generator, Request
from oq2vl_jax.eval.reply import Reply, SamplingOptions
from oq2vl_jax.serve.engine import NUM_TOP, TokenScore

DEFAULT_NEW_TOKENS = 512
MAX_IMAGES = 32
MAX_MESSAGES = 1024
MAX_PARTS = 1024
"""Of all messages together."""
MAX_CHARACTERS_PER_TOKEN = 16
"""Of the context, for all texts together, before any is tokenised; English has 4."""
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_FILE_BYTES = 20 * 2**20
"""Of a picture below --allow-files."""
MAX_CHOICES = 8
BLANKS = str.maketrans("", "", " \t\n\r\f")
REFUSED_FIELDS = (
    "tools", "functions", "audio", "prediction", "web_search_options", "best_of",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "min_p", "min_tokens", "ignore_eos",
    "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "suffix", "echo",
    "use_beam_search", "length_penalty", "stop_token_ids", "bad_words", "prompt_logprobs",
)  # fmt: skip
"""What would change the reply and is not done, where it is not at the value that means nothing."""
OF_NO_EFFECT = {"repetition_penalty": (1,), "best_of": (1,), "length_penalty": (1,)}


class RequestError(Exception):
    """What a client did wrong: one sentence, the HTTP status, and OpenAI's code and parameter where there is one."""

    def __init__(self, message: str, status: int = 400, code: str | None = None, parameter: str | None = None):
        super().__init__(message)
        self.status, self.code, self.parameter = status, code, parameter


class ChatRequest(NamedTuple):
    """options: of each choice, which differ in their seeds alone."""

    request: Request
    options: list[SamplingOptions]
    model: str
    is_stream: bool
    includes_usage: bool
    top_logprobs: int | None = None
    """Alternatives to a token that are named; None: no log-probabilities at all."""


def parse_request(
    body: bytes, generator: Generator, max_context: int, files_root: Path | None, model_name: str = "oq2vl_jax"
) -> ChatRequest:
    """Raises RequestError. Images are checked to decode; local ones only below files_root."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "it nests too deeply or is no UTF-8"
        raise RequestError(f"the body is not valid JSON: {reason}") from error
    if not isinstance(fields, dict):
        raise RequestError("the body must be a JSON object")
    check_fields(fields, model_name)
    check_size(fields.get("messages"), max_context)
    turns, system, images = read_messages(fields.get("messages"), files_root)
    prompt = generator.encode_turns(turns, system)
    room = max_context - len(prompt)
    if room < 1:
        raise RequestError(
            f"the messages are {len(prompt):,} tokens with the {generator.model_config.num_visual_tokens} of each of "
            f"{len(images)} images; this server takes {max_context} with the reply",
            code="context_length_exceeded",
        )
    stream_options = fields.get("stream_options")
    return ChatRequest(
        Request(prompt, images),
        with_seeds(read_options(fields, room), fields.get("n") or 1),
        model_name,
        bool(fields.get("stream")),
        isinstance(stream_options, dict) and bool(stream_options.get("include_usage")),
        read_top_logprobs(fields),
    )


def check_fields(fields: dict[str, Any], model_name: str) -> None:
    """Raises RequestError for a field that would change the reply and is not done, and for another model."""
    model = fields.get("model")
    if model not in (None, "", model_name):
        raise RequestError(
            f"the model {str(model)[:80]!r} is not served here; {model_name!r} is", 404, "model_not_found", "model"
        )
    for name in REFUSED_FIELDS:
        if fields.get(name) and fields[name] not in OF_NO_EFFECT.get(name, ()):
            raise RequestError(f"{name} is not supported; leave it out", parameter=name)
    if fields.get("response_format") not in (None, {"type": "text"}):
        raise RequestError("response_format is not supported; leave it out", parameter="response_format")
    if fields.get("tool_choice") not in (None, "none", "auto") or fields.get("function_call") not in (None, "none"):
        raise RequestError("tool_choice is not supported; leave it out", parameter="tool_choice")
    if fields.get("modalities") not in (None, ["text"]):
        raise RequestError("replies are text; leave modalities out", parameter="modalities")
    choices = fields.get("n")
    if choices is not None and (type(choices) is not int or not 1 <= choices <= MAX_CHOICES):
        raise RequestError(f"n must be 1 to {MAX_CHOICES}", parameter="n")


def check_size(messages: Any, max_context: int) -> None:
    """Raises RequestError for more than is looked at. Before any picture is decoded or text tokenised."""
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of at least one message", parameter="messages")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"{len(messages):,} messages, at most {MAX_MESSAGES:,} are taken", parameter="messages")
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    if len(parts) > MAX_PARTS:
        raise RequestError(f"{len(parts):,} parts, at most {MAX_PARTS:,} are taken", parameter="messages")
    texts = [*contents, *(part.get("text") for part in parts if isinstance(part, dict))]
    num_characters, most = sum(len(x) for x in texts if isinstance(x, str)), MAX_CHARACTERS_PER_TOKEN * max_context
    if num_characters > most:
        raise RequestError(
            f"{num_characters:,} characters of text, at most {most:,} are looked at here", 400,
            "context_length_exceeded", "messages",
        )  # fmt: skip


def read_options(fields: dict[str, Any], room: int) -> SamplingOptions:
    """room: tokens left for the reply."""
    name = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    wanted = number(fields, name, int, min(DEFAULT_NEW_TOKENS, room))
    if wanted < 1:
        raise RequestError(f"{name} must be at least 1, got {wanted}", parameter=name)
    seed = number(fields, "seed", int, None)
    try:
        return SamplingOptions(
            max_new_tokens=min(wanted, room),
            temperature=number(fields, "temperature", float, 0.0),
            top_p=number(fields, "top_p", float, 1.0),
            top_k=max(0, number(fields, "top_k", int, 0)),
            seed=random.randrange(2**31) if seed is None else seed % 2**31,
            stop=read_stops(fields.get("stop")),
        )
    except ValueError as error:  # UserError among them
        raise RequestError(str(error)) from error


def read_top_logprobs(fields: dict[str, Any]) -> int | None:
    top = fields.get("top_logprobs")
    if not fields.get("logprobs"):
        if top:
            raise RequestError("top_logprobs needs logprobs: true", parameter="top_logprobs")
        return None
    if fields["logprobs"] is not True:
        raise RequestError("logprobs must be true or false", parameter="logprobs")
    if top is not None and (type(top) is not int or not 0 <= top <= NUM_TOP):
        raise RequestError(f"top_logprobs must be 0 to {NUM_TOP}", parameter="top_logprobs")
    return top or 0


def with_seeds(options: SamplingOptions, count: int) -> list[SamplingOptions]:
    return [dataclasses.replace(options, seed=(options.seed + i) % 2**31) for i in range(count)]


def number(fields: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"{name} must be a number, got {str(value)[:40]!r}", parameter=name) from error


def read_stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    is_list = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not is_list or not all(isinstance(text, str) and len(text) <= MAX_STOP_CHARACTERS for text in stops):
        raise RequestError(
            f"stop must be a text or a list of at most {MAX_STOPS}, each of at most {MAX_STOP_CHARACTERS} characters",
            parameter="stop",
        )
    return tuple(stops)


def read_messages(messages: Any, files_root: Path | None) -> tuple[list[str], str | None, list[bytes]]:
    """(turns with <image> where pictures stand, human first and last; system message; pictures in order)."""
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
    """Text with <image> in place of the pictures; a marker that the client wrote as text, over one part or several, is
    none."""
    if content is None:
        return "", []
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RequestError(f"message {i}: content must be text or a list of parts")
    text, written, images = "", "", []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            written += part["text"]
        elif kind == "image_url":
            images.append(read_image(image_url(part, i), f"message {i}", files_root))
            text, written = f"{text}{as_text(written)}{IMAGE}\n", ""
        else:
            problem = "the text of a text part must be a string" if kind == "text" else None
            raise RequestError(f"message {i}: {problem or f'parts are text or image_url, got {str(kind)[:40]!r}'}")
    text += as_text(written)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"message {i}: text that is no UTF-8 (a lone surrogate)") from error
    return text, images


def as_text(written: str) -> str:
    return written.replace(IMAGE, IMAGE_IN_TEXT)


def image_url(part: dict[str, Any], i: int) -> str:
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str):
        raise RequestError(f"message {i}: image_url needs a url")
    return url


def read_image(url: str, where: str, files_root: Path | None) -> bytes:
    """The bytes of a data URL, or of a local file where the server allows it; they decode."""
    scheme = url[:8].partition(":")[0].lower() if ":" in url[:8] else ""
    if scheme == "data":
        data = read_data_url(url, where)
    elif scheme == "file" or "://" not in url:
        data = read_local_image(url, where, files_root)
    else:
        raise RequestError(f"{where}: {url.partition('://')[0][:20]} images are not fetched; send a data URL")
    try:
        check_image(data)
    except ImageError as problem:
        raise RequestError(f"{where}: the image cannot be used: {problem}") from problem
    return data


def read_data_url(url: str, where: str) -> bytes:
    """As the URL standard reads them: any case, percent-encoding, blanks and line breaks, with or without padding."""
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().rstrip().endswith("base64") or ";" not in head:
        raise RequestError(f"{where}: a data URL must be data:image/...;base64,...")
    payload = unquote(payload) if "%" in payload else payload
    payload = payload.translate(BLANKS).rstrip("=")
    try:
        return base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{where}: the image's base64 is broken; encode it again") from error


def read_local_image(url: str, where: str, files_root: Path | None) -> bytes:
    path = Path(unquote(re.sub("^file://", "", url, flags=re.IGNORECASE)))
    if files_root is None:
        raise RequestError(f"{where}: local files are not served here (--allow-files DIR allows a folder)")
    try:
        resolved = (files_root / path).resolve()
        if resolved.is_relative_to(files_root.resolve()) and resolved.is_file():
            if resolved.stat().st_size > MAX_FILE_BYTES:
                raise RequestError(f"{where}: the file has more than {MAX_FILE_BYTES:,} bytes")
            return resolved.read_bytes()
    except (ValueError, OSError):  # names no file can have: too long, with a NUL
        pass
    raise RequestError(f"{where}: no such file below the folder that is served")


def completion(
    chat: ChatRequest, replies: list[Reply], identity: str, logprobs: Sequence[dict[str, Any] | None]
) -> dict[str, Any]:
    """The answer to a request that does not stream. logprobs: of each reply."""
    choices = [
        {
            "index": i, "message": {"role": "assistant", "content": reply.text, "refusal": None},
            "logprobs": logprobs[i], "finish_reason": reply.finish_reason,
        }
        for i, reply in enumerate(replies)
    ]  # fmt: skip
    num_tokens = sum(len(reply.tokens) for reply in replies)
    return {**head(chat, identity, "chat.completion"), "choices": choices, "usage": usage(chat, num_tokens)}


def logprobs_of(chat: ChatRequest, scores: Sequence[TokenScore], codec: TextCodec) -> dict[str, Any] | None:
    """A choice's logprobs object; None where none were asked for."""
    num_top = chat.top_logprobs
    if num_top is None:
        return None

    def named(token: int, score: float) -> dict[str, Any]:
        written = codec.token_bytes(token)
        return {"token": written.decode(errors="replace"), "logprob": score, "bytes": list(written)}

    content = [
        {**named(found.token, found.score), "top_logprobs": [named(*pair) for pair in found.top[:num_top]]}
        for found in scores
    ]
    return {"content": content, "refusal": None}


def chunk(
    chat: ChatRequest,
    identity: str,
    delta: dict[str, str],
    finish_reason: str | None = None,
    index: int = 0,
    logprobs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One event of a stream."""
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
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
