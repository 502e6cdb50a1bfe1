"""Defines the metrics of the server for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from oq2vl_jax.serve.engine import Engine

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self.requests = Counter("oq2vl_requests", "Requests by HTTP status.", ["status"], registry=self._registry)
        self.prompt_tokens = Counter("oq2vl_prompt_tokens", "Tokens of answered prompts.", registry=self._registry)
        self.reply_tokens = Counter("oq2vl_reply_tokens", "Tokens of replies.", registry=self._registry)
        self.seconds = Histogram(
            "oq2vl_request_seconds", "From a request's headers to its last byte.", buckets=SECONDS,
            registry=self._registry,
        )  # fmt: skip
        running = Gauge("oq2vl_running", "Replies that are being written.", registry=self._registry)
        running.set_function(lambda: engine.num_running)
        waiting = Gauge("oq2vl_waiting", "Replies that wait for a free row.", registry=self._registry)
        waiting.set_function(lambda: engine.num_waiting)

    def text(self) -> bytes:
        return generate_latest(self._registry)
