"""The web application: /v1/chat/completions, /v1/models, /health and a page to try it.

Bodies are read up to a limit, and all bodies held at once up to another; parsing and image checks run in two threads,
so that a large picture does not keep the loop; what clients get wrong is a sentence in OpenAI's form.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from oq2vl_jax.serve import chat
from oq2vl_jax.serve.chat import ChatRequest, RequestError
from oq2vl_jax.serve.engine import Engine, EngineFullError, Event, Job

PAGE = Path(__file__).parent / "page.html"
NUM_PARSING_THREADS = 2
SECONDS_BETWEEN_LOOKS = 0.5
"""How often it is looked whether the client of a reply that does not stream is still there."""


class Server:
    """The handlers and what they share."""

    def __init__(
        self, engine: Engine, model_name: str, max_body_bytes: int, max_held_bytes: int, files_root: str | None
    ):
        self.engine, self.model_name = engine, model_name
        self.max_body_bytes, self.max_held_bytes = max_body_bytes, max_held_bytes
        self.files_root = Path(files_root) if files_root else None
        self.held_bytes = 0
        self._parsers = anyio.CapacityLimiter(NUM_PARSING_THREADS)

    def app(self) -> Starlette:
        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            self.engine.start()
            yield
            await anyio.to_thread.run_sync(self.engine.close)

        routes = [
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/", self.page),
        ]
        return Starlette(routes=routes, lifespan=lifespan)

    async def page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_text())

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self.model_name, "object": "model"}]})

    async def health(self, request: Request) -> Response:
        status = {"running": self.engine.num_running, "waiting": self.engine.num_waiting}
        if not self.engine.is_alive:
            return JSONResponse({"status": "the engine has stopped", **status}, 503)
        return JSONResponse({"status": "ok", **status})

    async def complete(self, request: Request) -> Response:
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        held = Held(self)

        def deliver(event: Event) -> None:
            events.put_nowait(event)
            if event.reply is not None or event.error is not None:
                held.release()

        def listen(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(deliver, event)

        try:
            parsed = await self._parse(request, held)
            job = Job(parsed.request, parsed.options, listen)
            self.engine.submit(job)
        except RequestError as problem:
            return error_response(str(problem), problem.status)
        except EngineFullError:
            held.release()
            return error_response("too many requests are waiting; try again later", 429)
        except ClientDisconnect:
            return Response(status_code=400)
        if parsed.is_stream:
            return StreamingResponse(self._stream(parsed, job, events, held), media_type="text/event-stream")
        try:
            return await self._whole(request, parsed, job, events)
        finally:
            held.release()

    async def _parse(self, request: Request, held: "Held") -> ChatRequest:
        """Raises RequestError. A body counts as held until it is parsed, its pictures until they are answered."""
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self.max_body_bytes:
            raise RequestError(f"the body has {int(declared):,} bytes, at most {self.max_body_bytes:,} are taken", 413)
        body = bytearray()
        try:
            async for part in request.stream():
                held.add(len(part))
                if held.num_bytes > self.max_body_bytes:
                    raise RequestError(f"the body has more than {self.max_body_bytes:,} bytes", 413)
                if self.held_bytes > self.max_held_bytes:
                    raise RequestError("the server holds too many large requests; try again later", 503)
                body += part
            parsed = await anyio.to_thread.run_sync(
                chat.parse_request,
                bytes(body),
                self.engine.generator,
                self.engine.max_context,
                self.files_root,
                self.model_name,
                limiter=self._parsers,
            )
        except BaseException:
            held.release()
            raise
        held.release()
        held.add(sum(map(len, parsed.request.images)))
        return parsed

    async def _whole(self, request: Request, parsed: ChatRequest, job: Job, events: "asyncio.Queue[Event]") -> Response:
        """Waits for the reply, and for the client to go away."""
        try:
            while True:
                try:
                    event = await asyncio.wait_for(events.get(), SECONDS_BETWEEN_LOOKS)
                except TimeoutError:
                    if await request.is_disconnected():
                        return Response(status_code=400)
                    continue
                if event.error is not None:
                    return error_response(event.error, 500)
                if event.reply is not None:
                    return JSONResponse(chat.completion(parsed, event.reply, chat.new_identity()))
        finally:
            job.cancel()  # of no effect on a reply that has ended

    async def _stream(
        self, parsed: ChatRequest, job: Job, events: "asyncio.Queue[Event]", held: "Held"
    ) -> AsyncIterator[str]:
        """Server-sent events. A client that goes away ends this generator, and with it the job."""
        identity = chat.new_identity()
        try:
            yield sse(chat.chunk(parsed, identity, {"role": "assistant", "content": ""}))
            while True:
                event = await events.get()
                if event.piece:
                    yield sse(chat.chunk(parsed, identity, {"content": event.piece}))
                if event.error is not None:
                    yield sse(chat.error_body(event.error, 500))
                    return
                if event.reply is not None:
                    yield sse(chat.chunk(parsed, identity, {}, event.reply.finish_reason))
                    if parsed.includes_usage:
                        yield sse(chat.usage_chunk(parsed, identity, len(event.reply.tokens)))
                    yield "data: [DONE]\n\n"
                    return
        finally:
            job.cancel()
            held.release()


class Held:
    """Bytes of one request that count against the server's limit until they are released."""

    def __init__(self, server: Server):
        self._server, self.num_bytes = server, 0

    def add(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._server.held_bytes += num_bytes

    def release(self) -> None:
        self._server.held_bytes -= self.num_bytes
        self.num_bytes = 0


def sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def error_response(message: str, status: int) -> Response:
    return JSONResponse(chat.error_body(message, status), status)
