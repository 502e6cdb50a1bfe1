"""Continuous batching: a fixed number of rows decodes together, and a request joins as soon as a row is free.

One thread owns the device. After every few decoding steps it sends new text to the listeners, frees the rows of replies
that ended or whose client has gone, and admits waiting requests (one prefill each). Rows are independent of each other
(generate/decoding.py), so a request gets the same reply as alone.
"""

import collections
import contextlib
import threading
import traceback
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from oq2vl_jax.generate.decoding import NOTHING, DecodeState, Sampling, TokenScores, decode, insert_row
from oq2vl_jax.generate.generator import STEPS_PER_PIECE, Generator, Request
from oq2vl_jax.generate.reply import NUM_TOP, Reply, ReplyText, SamplingOptions
from oq2vl_jax.model.qwen2 import init_cache

SHUTTING_DOWN = "the server is shutting down; ask another or later"


class TokenScore(NamedTuple):
    """Log-probabilities of a token of a reply and of the NUM_TOP most likely tokens at its position, best first."""

    token: int
    score: float
    top: list[tuple[int, float]]


class Event(NamedTuple):
    """Message to a job's listener: a piece of text, or at the end the reply or an error with its HTTP status.

    scores: of the tokens added since the last event, if the job asked for them.
    """

    piece: str = ""
    scores: tuple[TokenScore, ...] = ()
    reply: Reply | None = None
    error: str | None = None
    status: int = 500


class Job:
    """One reply in progress. `listen` must not block; the engine's thread calls it, or drain() for a waiting job."""

    def __init__(
        self, request: Request, options: SamplingOptions, listen: Callable[[Event], None], wants_scores: bool = False
    ):
        self.request, self.options, self.listen, self.wants_scores = request, options, listen, wants_scores
        self.scores: list[TokenScore] = []
        """Scores that the listener has not received yet."""
        self.is_cancelled = False
        self.text: ReplyText | None = None


class EngineFullError(Exception):
    """More requests are waiting than the engine takes."""


class EngineStoppedError(Exception):
    """The engine takes no more requests."""


class Engine:
    def __init__(self, generator: Generator, num_rows: int, max_context: int, max_waiting: int):
        self.generator, self.num_rows, self.max_context = generator, num_rows, max_context
        self._max_waiting = max_waiting
        self._waiting: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        """Guards the waiting jobs and the flags for closing and draining."""
        self._jobs: list[Job | None] = [None] * num_rows
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._is_closing = self._is_draining = False
        self._state = self._empty_state()  # allocated here, so that a cache that does not fit fails at once

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> None:
        """Stops accepting jobs. Waiting jobs get an error, running ones finish."""
        with self._changed:
            self._is_draining = True
            waiting, self._waiting = self._waiting, collections.deque()
        for job in waiting:
            job.listen(Event(error=SHUTTING_DOWN, status=503))

    def close(self) -> None:
        """Ends the thread after the current piece; unfinished jobs get an error."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_running(self) -> int:
        return sum(job is not None for job in self._jobs)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, *jobs: Job) -> None:
        """Queues all jobs or none. Raises EngineFullError, EngineStoppedError."""
        with self._changed:
            if self._is_closing or self._is_draining:
                raise EngineStoppedError
            if len(self._waiting) + len(jobs) > self._max_waiting:
                raise EngineFullError
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Cancels a job whose client has gone: it leaves the queue, or its row is freed with the next piece."""
        job.is_cancelled = True
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(job)

    def _run(self) -> None:
        state = self._state
        del self._state  # its buffers are donated from now on
        try:
            while not self._is_closing:
                try:
                    state = self._admit(state)
                    if self.num_running:
                        state = self._decode_piece(state)
                except Exception:  # a device error or a bug must not end the server; the requests get an error
                    traceback.print_exc()
                    self._fail_all("the server failed on this batch; its log says why")
                    state = self._empty_state()
        finally:
            self._is_closing = True
            self._fail_all(SHUTTING_DOWN, 503)

    def _admit(self, state: DecodeState) -> DecodeState:
        """Fills free rows with waiting jobs; blocks while no job waits or runs."""
        while None in self._jobs:
            with self._changed:
                while not (self._waiting or self.num_running or self._is_closing):
                    self._changed.wait()
                if not self._waiting or self._is_closing:
                    return state
                job = self._waiting.popleft()
            if job.is_cancelled:
                continue
            row = self._jobs.index(None)
            self._jobs[row] = job
            try:
                num_top = NUM_TOP if job.wants_scores else 0
                first, scores = self.generator.start([job.request], job.options, self.max_context, num_top)
            except ValueError as problem:  # ImageError, UserError: only this request fails
                self._jobs[row] = None
                job.listen(Event(error=str(problem), status=400))
                continue
            state = insert_row(state, first, jnp.int32(row))
            job.text = ReplyText(self.generator.codec, self.generator.stops, job.options)
            self._take(row, np.asarray(first.token).tolist(), scores, 0)
        return state

    def _decode_piece(self, state: DecodeState) -> DecodeState:
        options = [job.options if job else SamplingOptions() for job in self._jobs]
        columns = zip(*((o.temperature, o.top_p, o.top_k, o.seed) for o in options), strict=True)
        kinds = (jnp.float32, jnp.float32, jnp.int32, jnp.int32)
        sampling = Sampling(*(jnp.array(column, kind) for column, kind in zip(columns, kinds, strict=True)))
        is_free = np.array([job is None for job in self._jobs])
        state = state._replace(is_done=jnp.asarray(is_free))
        generator = self.generator
        num_top = NUM_TOP if any(job and job.wants_scores for job in self._jobs) else 0
        state, output, scores = decode(
            generator.weights, state, sampling, generator.stop_tokens, STEPS_PER_PIECE, generator.dtype, num_top
        )
        scores = scores and jax.device_get(scores)
        for row, tokens in enumerate(np.asarray(output).tolist()):
            if self._jobs[row] is not None:
                self._take(row, [token for token in tokens if token != NOTHING], scores, row)
        return state

    def _take(self, row: int, tokens: list[int], scores: TokenScores | None, place: int) -> None:
        """Sends new tokens of a row to its listener; frees the row of a finished reply. place: the row in scores."""
        job = self._jobs[row]
        assert job is not None
        assert job.text is not None
        if job.is_cancelled:
            self._jobs[row] = None
            return
        num_before = len(job.text.tokens)
        job.text.add(tokens)
        if job.wants_scores and scores is not None:
            job.scores += token_scores(job.text.tokens[num_before:], TokenScores(*(x[place] for x in scores)))
        piece = job.text.new_piece()
        if piece:
            job.listen(Event(piece=piece, scores=tuple(job.scores)))
            job.scores = []
        if job.text.is_done:
            self._jobs[row] = None
            job.listen(Event(reply=job.text.reply(), scores=tuple(job.scores)))

    def _fail_all(self, message: str, status: int = 500) -> None:
        failed = [job for job in self._jobs if job is not None]
        self._jobs = [None] * self.num_rows
        if self._is_closing:
            with self._changed:
                failed += self._waiting
                self._waiting.clear()
        for job in failed:
            job.listen(Event(error=message, status=status))

    def _empty_state(self) -> DecodeState:
        config = self.generator.model_config.decoder
        self.generator.check_cache(self.num_rows, self.max_context)
        cache = init_cache(config, self.num_rows, self.max_context, self.generator.dtype)
        tokens, positions = jnp.zeros(self.num_rows, jnp.int32), jnp.zeros(self.num_rows, jnp.int32)
        return DecodeState(tokens, positions, jnp.ones(self.num_rows, bool), cache)


def token_scores(tokens: list[int], scores: TokenScores) -> list[TokenScore]:
    """Returns the scores of the tokens. scores: of one row; its first steps belong to the tokens."""
    chosen, top, top_tokens = (np.asarray(x)[: len(tokens)].tolist() for x in scores)
    return [
        TokenScore(token, score, list(zip(names, values, strict=True)))
        for token, score, names, values in zip(tokens, chosen, top_tokens, top, strict=True)
    ]
