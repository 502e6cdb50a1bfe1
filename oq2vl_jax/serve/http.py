"""Runs the application in uvicorn, with a time limit on the headers of a request and an orderly shutdown."""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS_FOR_HEADERS = 20
SECONDS_TO_END = 600
"""Time that running replies have to finish after the signal to end; longer ones are cut off."""


class TimedProtocol(H11Protocol):
    """Closes a connection that has not sent the whole head of a request in time."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._set_deadline()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._clear_deadline()
        elif self._deadline is None:
            self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        super().connection_lost(exc)

    def _set_deadline(self) -> None:
        self._deadline = self.loop.call_later(SECONDS_FOR_HEADERS, self._close_late)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _close_late(self) -> None:
        self._deadline = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class OrderlyServer(uvicorn.Server):
    """Calls `drain` on SIGTERM or SIGINT and exits with 0 once running replies have ended; a second one forces it."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]):
        super().__init__(config)
        self._drain = drain

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Replaces uvicorn's method, which raises the signal again at the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._leave)
        yield

    def _leave(self) -> None:
        self.force_exit = self.should_exit  # true on the second signal
        self.should_exit = True
        self._drain()


def run_server(app: Any, host: str, port: int, drain: Callable[[], None]) -> None:
    """Serves until a signal, then returns when the running replies have ended."""
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", http=TimedProtocol, timeout_graceful_shutdown=SECONDS_TO_END
    )
    OrderlyServer(config, drain).run()
