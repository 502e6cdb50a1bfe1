"""Tracks what the web application holds for a request until it is answered: its bytes, and its choices in progress."""

import asyncio
import contextlib
from collections.abc import Callable

from oq2vl_jax.generate.reply import Reply
from oq2vl_jax.serve.chat import ChatRequest
from oq2vl_jax.serve.engine import Engine, Event, Job, TokenScore


class HeldBytes:
    """Total of the bytes held for all requests."""

    def __init__(self):
        self.total = 0

    def of_request(self) -> "Held":
        return Held(self)


class Held:
    """Bytes held for one request; they count until they are released."""

    def __init__(self, of_all: HeldBytes):
        self._of_all, self.num_bytes = of_all, 0

    def add(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._of_all.total += num_bytes

    def release(self) -> None:
        self._of_all.total -= self.num_bytes
        self.num_bytes = 0


class Replies:
    """The choices of one request in progress: one job per choice, one queue for all their events."""

    def __init__(self, engine: Engine, parsed: ChatRequest, held: Held):
        """Submits the jobs. Raises EngineFullError, EngineStoppedError."""
        self._engine, self._held = engine, held
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._found: dict[int, Reply] = {}
        self._num_ended = 0
        wants_scores = parsed.top_logprobs is not None
        self._jobs = [Job(parsed.request, o, self._listener(i), wants_scores) for i, o in enumerate(parsed.options)]
        self.scores: list[list[TokenScore]] = [[] for _ in self._jobs]
        engine.submit(*self._jobs)

    def _listener(self, i: int) -> Callable[[Event], None]:
        def listen(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed
                self._loop.call_soon_threadsafe(self._deliver, i, event)

        return listen

    def _deliver(self, i: int, event: Event) -> None:
        self._events.put_nowait((i, event))
        self._num_ended += event.reply is not None or event.error is not None
        if self._num_ended == len(self._jobs):  # even if nobody reads the events any more
            self._held.release()

    async def next(self) -> tuple[int, Event]:
        """Returns (index of the choice, its event) when the next event arrives."""
        i, event = await self._events.get()
        self.scores[i] += event.scores
        if event.reply is not None:
            self._found[i] = event.reply
        return i, event

    @property
    def are_whole(self) -> bool:
        return len(self._found) == len(self._jobs)

    @property
    def done(self) -> list[Reply]:
        return [self._found[i] for i in sorted(self._found)]

    def close(self) -> None:
        """Cancels the jobs and releases the bytes. Replies that have ended are not changed."""
        for job in self._jobs:
            self._engine.cancel(job)
        self._held.release()
