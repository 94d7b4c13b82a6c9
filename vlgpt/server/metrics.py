"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """One registry per server: several of them in one process (tests) do not mix."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "vlgpt_requests", "Chat requests by outcome", ["outcome"], registry=self.registry
        )
        self.seconds = Histogram(
            "vlgpt_request_seconds",
            "Time from request to whole reply",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "vlgpt_batch_size",
            "Requests decoded together",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=self.registry,
        )
        self.batch_seconds = Histogram(
            "vlgpt_batch_seconds", "Time to decode one batch", buckets=SECONDS, registry=self.registry
        )
        self.prompt_positions = Counter(
            "vlgpt_prompt_positions", "Positions of prompts read", registry=self.registry
        )
        self.reply_positions = Counter(
            "vlgpt_reply_positions", "Positions of replies written", registry=self.registry
        )
        self.pictures = Counter("vlgpt_pictures_drawn", "Pictures drawn", registry=self.registry)

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A gauge that is asked when metrics are read."""
        Gauge(name, about, registry=self.registry).set_function(value)

    def observe_batch(self, size: int, seconds: float) -> None:
        """Count one decoded batch: `size` requests in `seconds`."""
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format, as UTF-8."""
        return generate_latest(self.registry)
