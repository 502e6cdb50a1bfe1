"""Converts parsed bodies to token ids, and replies to OpenAI's chat completions."""

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from oq2vl_jax.data.text.codec import TextCodec
from oq2vl_jax.generate.generator import Generator, Request
from oq2vl_jax.generate.reply import Reply, SamplingOptions
from oq2vl_jax.serve.answers import RequestError
from oq2vl_jax.serve.body import Body
from oq2vl_jax.serve.engine import TokenScore


class ChatRequest(NamedTuple):
    """A tokenised request. options: one per choice; top_logprobs: as in Body."""

    request: Request
    options: list[SamplingOptions]
    model: str
    is_stream: bool
    includes_usage: bool
    top_logprobs: int | None = None


def to_request(body: Body, generator: Generator, max_context: int, model_name: str = "oq2vl_jax") -> ChatRequest:
    """Tokenises a body. Raises RequestError for a prompt that leaves no room for a reply."""
    prompt = generator.encode_turns(body.turns, body.system)
    room = max_context - len(prompt)
    if room < 1:
        raise RequestError(
            f"the messages are {len(prompt):,} tokens with the {generator.model_config.num_visual_tokens} of each of "
            f"{len(body.images)} images; this server takes {max_context} with the reply",
            code="context_length_exceeded",
        )
    options = [dataclasses.replace(o, max_new_tokens=min(o.max_new_tokens, room)) for o in body.options]
    return ChatRequest(
        Request(prompt, body.images), options, model_name, body.is_stream, body.includes_usage, body.top_logprobs
    )


def completion(
    chat: ChatRequest, replies: list[Reply], identity: str, logprobs: Sequence[dict[str, Any] | None]
) -> dict[str, Any]:
    """Builds the response to a request that does not stream. logprobs: one object per reply."""
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
    """Builds the logprobs object of a choice; None if the request did not ask for it."""
    num_top = chat.top_logprobs
    if num_top is None:
        return None

    def named(token: int, score: float) -> dict[str, Any]:
        written = codec.token_bytes(token)
        return {"token": written.decode(errors="replace"), "logprob": score, "bytes": list(written)}

    content = [
        {**named(entry.token, entry.score), "top_logprobs": [named(*pair) for pair in entry.top[:num_top]]}
        for entry in scores
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
    """Builds one event of a stream."""
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
