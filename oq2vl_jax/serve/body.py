"""Parses and checks the body of a request in OpenAI's chat format: JSON to turns, pictures and options.

Supported fields: messages (system, user, assistant; text and image_url parts), max_tokens or max_completion_tokens,
temperature (default 0, not 1, so that replies are those of an evaluation), top_p, top_k, seed, stop, n, logprobs,
stream. Unsupported fields that would change a reply are refused by name; other fields are ignored, as clients send
many. docs/server.md lists all fields and bounds. This module needs neither jax nor a model, because other processes
read large bodies (body_readers.py).
"""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

from oq2vl_jax.data.text.codec import IMAGE_IN_TEXT
from oq2vl_jax.data.text.templates import IMAGE
from oq2vl_jax.generate.reply import NUM_TOP, SamplingOptions
from oq2vl_jax.serve.answers import RequestError
from oq2vl_jax.serve.pictures import read_image

DEFAULT_NEW_TOKENS = 512
MAX_IMAGES = 32
MAX_MESSAGES = 1024
MAX_PARTS = 1024
"""Parts of all messages together."""
MAX_CHARACTERS_PER_TOKEN = 16
"""Limit on the characters of all texts, per token of the context; checked before tokenising. English has about 4."""
MARKS_PER_PART = 8
"""Brackets and commas allowed for each message or part; JSON needs fewer."""
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_CHOICES = 8
REFUSED_FIELDS = (
    "tools", "functions", "audio", "prediction", "web_search_options", "best_of",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "min_p", "min_tokens", "ignore_eos",
    "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "suffix", "echo",
    "use_beam_search", "length_penalty", "stop_token_ids", "bad_words", "prompt_logprobs",
)  # fmt: skip
"""Unsupported fields that would change the reply; refused unless they are empty, 0, false or in OF_NO_EFFECT."""
OF_NO_EFFECT = {"repetition_penalty": (1,), "best_of": (1,), "length_penalty": (1,)}


class Limits(NamedTuple):
    """Limits of the server. files_root: folder below which requests may name pictures by path; None: no folder."""

    max_context: int
    files_root: Path | None
    model_name: str


class Body(NamedTuple):
    """A parsed body. turns: with <image> in place of the pictures, human first and last; images: encoded, in order;
    options: one per choice, differing only in the seed; top_logprobs: number of alternatives per token, None for no
    log-probabilities."""

    turns: list[str]
    system: str | None
    images: list[bytes]
    options: list[SamplingOptions]
    is_stream: bool
    includes_usage: bool
    top_logprobs: int | None


def read_body(body: bytes, limits: Limits) -> Body:
    """Parses a body and checks that its images decode. Raises RequestError."""
    check_marks(body, limits.max_context)
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "it nests too deeply or is no UTF-8"
        raise RequestError(f"the body is not valid JSON: {reason}") from error
    if not isinstance(fields, dict):
        raise RequestError("the body must be a JSON object")
    check_fields(fields, limits.model_name)
    check_size(fields.get("messages"), limits.max_context)
    options = with_seeds(read_options(fields, limits.max_context), fields.get("n") or 1)
    top_logprobs = read_top_logprobs(fields)
    stream_options = fields.get("stream_options")
    includes_usage = isinstance(stream_options, dict) and bool(stream_options.get("include_usage"))
    turns, system, images = read_messages(fields.get("messages"), limits.files_root)
    return Body(turns, system, images, options, bool(fields.get("stream")), includes_usage, top_logprobs)


def check_fields(fields: dict[str, Any], model_name: str) -> None:
    """Raises RequestError for an unsupported field that would change the reply, and for another model."""
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


def check_marks(body: bytes, max_context: int) -> None:
    """Raises RequestError for JSON with more values than a request within the bounds has. Python's JSON parser would
    block all threads for a second and take a gigabyte."""
    num_marks = sum(body.count(mark) for mark in b"{[,")
    if num_marks > MAX_CHARACTERS_PER_TOKEN * max_context + MARKS_PER_PART * (MAX_MESSAGES + MAX_PARTS):
        raise RequestError(f"the body has {num_marks:,} brackets and commas, more than a request within the bounds has")


def check_size(messages: Any, max_context: int) -> None:
    """Raises RequestError for too many messages, parts or characters, before images are decoded or texts tokenised."""
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


def read_options(fields: dict[str, Any], most: int) -> SamplingOptions:
    """Reads the sampling options. most: limit on the new tokens. Raises RequestError."""
    name = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    wanted = number(fields, name, int, min(DEFAULT_NEW_TOKENS, most))
    if wanted < 1:
        raise RequestError(f"{name} must be at least 1, got {wanted}", parameter=name)
    seed = number(fields, "seed", int, None)
    try:
        return SamplingOptions(
            max_new_tokens=min(wanted, most),
            temperature=number(fields, "temperature", float, 0.0),
            top_p=number(fields, "top_p", float, 1.0),
            top_k=max(0, number(fields, "top_k", int, 0)),
            seed=random.randrange(2**31) if seed is None else seed % 2**31,
            stop=read_stops(fields.get("stop")),
        )
    except ValueError as error:  # including UserError
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
    """Returns (turns, system message, pictures in order). Turns have <image> in place of the pictures, human first and
    last. Raises RequestError."""
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
    """Returns (text with <image> in place of the pictures, pictures). An <image> that the client wrote as text, in one
    part or across several, is escaped."""
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
