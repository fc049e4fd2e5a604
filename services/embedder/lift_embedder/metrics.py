"""Prometheus metrics of one server, in a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

ROWS = (1, 4, 16, 64, 256, 1024)
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """What an operator watches; names are part of the interface."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.captions = Counter(
            "lift_captions", "Captions answered, by how: hit, miss, coalesced.", ["how"], registry=registry
        )
        self.errors = Counter("lift_errors", "Error answers.", ["code"], registry=registry)
        self.embedded_tokens = Counter(
            "lift_embedded_tokens", "Tokens sent to the engine.", registry=registry
        )
        self.truncated = Counter("lift_truncated_captions", "Captions that were cut.", registry=registry)
        self.rejected = Counter("lift_rejected_vectors", "Vectors that may not be stored.", registry=registry)
        self.restarts = Counter("lift_engine_restarts", "Engine restarts.", registry=registry)
        self.queue_tokens = Gauge(
            "lift_queue_tokens", "Tokens waiting for or in the engine.", registry=registry
        )
        self.engine_up = Gauge("lift_engine_up", "1 while the engine takes captions.", registry=registry)
        self.batch_rows = Histogram("lift_batch_rows", "Captions per batch.", buckets=ROWS, registry=registry)
        self.engine_seconds = Histogram(
            "lift_engine_seconds", "Batch, engine.", buckets=SECONDS, registry=registry
        )
        self.commit_seconds = Histogram(
            "lift_commit_seconds", "Batch, commit.", buckets=SECONDS, registry=registry
        )
        self.request_seconds = Histogram(
            "lift_request_seconds", "Request.", buckets=SECONDS, registry=registry
        )

    def render(self) -> bytes:
        return generate_latest(self.registry)
