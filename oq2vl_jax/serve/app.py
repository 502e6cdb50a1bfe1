"""Defines the web application: /v1/chat/completions, /v1/models, /health, /metrics, /version and a page to try it.

A body has a limit on its size and on the time to send it; all bodies held at once have another limit. Two threads parse
and tokenise bodies, and other processes parse the large ones, so that other requests do not wait. A client's mistake is
answered with one sentence in OpenAI's error format. docs/server.md lists the fields and the bounds.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from oq2vl_jax.generate.reply import Reply
from oq2vl_jax.serve import chat
from oq2vl_jax.serve.answers import RequestError, error_body, error_response, event
from oq2vl_jax.serve.body import Limits, read_body
from oq2vl_jax.serve.body_readers import BodyReaders, ReceivedBody
from oq2vl_jax.serve.chat import ChatRequest
from oq2vl_jax.serve.engine import SHUTTING_DOWN, Engine, EngineFullError, EngineStoppedError, TokenScore
from oq2vl_jax.serve.gate import Admission, Gate
from oq2vl_jax.serve.metrics import Metrics
from oq2vl_jax.serve.replies import Held, HeldBytes, Replies

PAGE = Path(__file__).parent / "page.html"
NUM_PARSING_THREADS = 2
SECONDS_BETWEEN_LOOKS = 0.5
"""Interval of the checks that the client of a reply that does not stream is still connected."""
SECONDS_TO_SEND = 30
"""Time limit for receiving a body of any size; 20 MiB need 6 Mbit/s."""
LOCAL = Admission.of("127.0.0.1", (), (), None)


class Server:
    """The request handlers and their shared state."""

    def __init__(
        self,
        engine: Engine,
        model_name: str,
        max_body_bytes: int,
        max_held_bytes: int,
        files_root: str | None,
        admission: Admission = LOCAL,
    ):
        self.engine, self.model_name, self.admission = engine, model_name, admission
        self.max_body_bytes, self.max_held_bytes = max_body_bytes, max_held_bytes
        self.files_root = Path(files_root) if files_root else None
        self._held = HeldBytes()
        self.metrics, self._created = Metrics(engine), int(time.time())
        self._parsers = anyio.CapacityLimiter(NUM_PARSING_THREADS)
        self._limits = Limits(engine.max_context, self.files_root, model_name)
        self._readers = BodyReaders()

    def app(self) -> Starlette:
        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            self.engine.start()
            yield
            await anyio.to_thread.run_sync(self.engine.close)
            self._readers.close()

        routes = [
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/version", self.version),
            Route("/", self.page),
        ]
        middleware = [Middleware(Gate, admission=self.admission)]
        if self.admission.origins:
            allowed = list(self.admission.origins)
            middleware.append(Middleware(CORSMiddleware, allow_origins=allowed, allow_headers=["*"]))
        handlers: dict[Any, Callable] = {HTTPException: not_served, Exception: failed}
        return Starlette(routes=routes, lifespan=lifespan, middleware=middleware, exception_handlers=handlers)

    async def page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_text())

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.model_name:
            return error_response(f"the model {name[:80]!r} is not served here", 404, "model_not_found", "model")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self.model_name, "object": "model", "created": self._created, "owned_by": "oq2vl_jax"}

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": version("oq2vl_jax")})

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def health(self, request: Request) -> Response:
        status = {"running": self.engine.num_running, "waiting": self.engine.num_waiting}
        if not self.engine.is_alive:
            return JSONResponse({"status": "the engine has stopped", **status}, 503)
        return JSONResponse({"status": "ok", **status})

    async def complete(self, request: Request) -> Response:
        start = time.monotonic()
        response = await self._complete(request)
        self.metrics.requests.labels(str(response.status_code)).inc()
        if not isinstance(response, StreamingResponse):
            self.metrics.seconds.observe(time.monotonic() - start)
        return response

    async def _complete(self, request: Request) -> Response:
        held = self._held.of_request()
        try:
            parsed = await self._parse(request, held)
            replies = Replies(self.engine, parsed, held)
        except RequestError as problem:
            return error_response(str(problem), problem.status, problem.code, problem.parameter)
        except EngineFullError:
            held.release()
            return error_response("too many requests are waiting; try again later", 429)
        except EngineStoppedError:
            held.release()
            return error_response(SHUTTING_DOWN, 503)
        except ClientDisconnect:
            return Response(status_code=400)
        if parsed.is_stream:
            return StreamingResponse(self._stream(parsed, replies), media_type="text/event-stream")
        try:
            return await self._whole(request, parsed, replies)
        finally:
            replies.close()

    async def _parse(self, request: Request, held: Held) -> ChatRequest:
        """Receives and parses a body. It counts as held until it is parsed, its pictures until the request is answered.
        Raises RequestError."""
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self.max_body_bytes:
            raise RequestError(f"the body has {int(declared):,} bytes, at most {self.max_body_bytes:,} are taken", 413)
        try:
            with ReceivedBody() as body:
                await self._receive(request, held, body)
                parsed = await anyio.to_thread.run_sync(self._read, body, limiter=self._parsers)
        except OSError as error:
            held.release()
            raise RequestError(f"no room for a large request ({error.strerror}); try again later", 503) from error
        except BaseException:
            held.release()
            raise
        held.release()
        held.add(sum(map(len, parsed.request.images)))
        return parsed

    def _read(self, body: ReceivedBody) -> ChatRequest:
        """Parses and tokenises a body, in a worker thread. Raises RequestError."""
        file = body.file
        parsed_body = self._readers.read(file, self._limits) if file else read_body(bytes(body.start), self._limits)
        return chat.to_request(parsed_body, self.engine.generator, self.engine.max_context, self.model_name)

    async def _receive(self, request: Request, held: Held, body: ReceivedBody) -> None:
        try:
            with anyio.fail_after(SECONDS_TO_SEND):
                async for part in request.stream():
                    held.add(len(part))
                    if held.num_bytes > self.max_body_bytes:
                        raise RequestError(f"the body has more than {self.max_body_bytes:,} bytes", 413)
                    if self._held.total > self.max_held_bytes:
                        raise RequestError("the server holds too many large requests; try again later", 503)
                    body.add(part)
        except TimeoutError as error:
            raise RequestError(f"the body did not arrive within {SECONDS_TO_SEND} s", 408) from error

    async def _whole(self, request: Request, parsed: ChatRequest, replies: Replies) -> Response:
        """Waits until all replies are whole, one fails or the client disconnects."""
        while True:
            try:
                _, update = await asyncio.wait_for(replies.next(), SECONDS_BETWEEN_LOOKS)
            except TimeoutError:
                if await request.is_disconnected():
                    return Response(status_code=400)
                continue
            if update.error is not None:
                return error_response(update.error, update.status)
            if replies.are_whole:
                self._count(parsed, replies.done)
                logprobs = [self._logprobs(parsed, replies.scores[i]) for i in range(len(parsed.options))]
                return JSONResponse(chat.completion(parsed, replies.done, chat.new_identity(), logprobs))

    def _logprobs(self, parsed: ChatRequest, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        return chat.logprobs_of(parsed, scores, self.engine.generator.codec)

    async def _stream(self, parsed: ChatRequest, replies: Replies) -> AsyncIterator[str]:
        """Yields server-sent events. A client that disconnects ends this generator, which cancels the jobs."""
        identity, start = chat.new_identity(), time.monotonic()
        try:
            for i in range(len(parsed.options)):
                yield event(chat.chunk(parsed, identity, {"role": "assistant", "content": ""}, index=i))
            while not replies.are_whole:
                i, update = await replies.next()
                logprobs = self._logprobs(parsed, update.scores) if update.scores else None
                if update.piece:
                    yield event(chat.chunk(parsed, identity, {"content": update.piece}, index=i, logprobs=logprobs))
                if update.error is not None:
                    yield event(error_body(update.error, update.status))
                    return
                if update.reply is not None:
                    yield event(chat.chunk(parsed, identity, {}, update.reply.finish_reason, i, logprobs))
            self._count(parsed, replies.done)
            if parsed.includes_usage:
                yield event(chat.usage_chunk(parsed, identity, sum(len(reply.tokens) for reply in replies.done)))
            yield "data: [DONE]\n\n"
        finally:
            self.metrics.seconds.observe(time.monotonic() - start)
            replies.close()

    def _count(self, parsed: ChatRequest, replies: list[Reply]) -> None:
        self.metrics.prompt_tokens.inc(len(parsed.request.prompt))
        self.metrics.reply_tokens.inc(sum(len(reply.tokens) for reply in replies))


async def not_served(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    path = request.url.path[:80]
    message = {404: f"there is no {path!r} here", 405: f"{path!r} does not take {request.method}"}
    return error_response(message.get(problem.status_code, problem.detail), problem.status_code)


async def failed(request: Request, problem: Exception) -> Response:
    return error_response("the server failed on this request; its log says why", 500)
