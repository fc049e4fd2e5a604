"""Prometheus metrics of one server, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)

ROWS = (1, 4, 16, 64, 256, 1024)
TOKENS = (16, 64, 256, 1024, 4096, 8192, 16384, 65536)
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
REQUEST_SECONDS = (0.0003, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """What an operator watches; names and labels are part of the interface.

    Counters are exposed with `_total` behind their name. docker/grafana/lift-embedder.json shows all of them.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        self.build = Info("lift_build", "What runs: version, engine, model, recipe.", registry=registry)
        self.captions = Counter(
            "lift_captions", "Captions answered, by how: hit, miss, coalesced.", ["how"], registry=registry
        )
        for how in ("hit", "miss", "coalesced"):  # a rate needs a series from the start
            self.captions.labels(how)

        self.request_seconds = Histogram(
            "lift_request_seconds",
            "From a request's headers to the end of its answer, by route.",
            ["route"],
            buckets=REQUEST_SECONDS,
            registry=registry,
        )
        self.errors = Counter(
            "lift_errors", "Error answers, by status and code.", ["status", "code"], registry=registry
        )
        self.clients_left = Counter(
            "lift_clients_left", "Clients that went away before their answer.", registry=registry
        )
        self.buffer_bytes = Gauge(
            "lift_buffer_bytes", "Bytes of bodies and long answers that are held.", registry=registry
        )

        self.queue_tokens = Gauge(
            "lift_queue_tokens", "Tokens waiting for or in the engine.", registry=registry
        )
        self.queue_rows = Gauge(
            "lift_queue_rows", "Captions waiting for or in the engine.", registry=registry
        )
        self.queue_bytes = Gauge(
            "lift_queue_bytes", "Bytes of captions waiting for or in the engine.", registry=registry
        )
        self.batch_rows = Histogram("lift_batch_rows", "Captions per batch.", buckets=ROWS, registry=registry)
        self.batch_tokens = Histogram(
            "lift_batch_tokens", "Tokens per batch.", buckets=TOKENS, registry=registry
        )

        self.engine_up = Gauge("lift_engine_up", "1 while the engine takes captions.", registry=registry)
        self.restarts = Counter("lift_engine_restarts", "Engine restarts.", registry=registry)
        self.engine_seconds = Histogram(
            "lift_engine_seconds", "Seconds of a batch in the engine.", buckets=SECONDS, registry=registry
        )
        self.commit_seconds = Histogram(
            "lift_commit_seconds", "Seconds of a batch's durable commit.", buckets=SECONDS, registry=registry
        )
        self.embedded_tokens = Counter(
            "lift_embedded_tokens", "Tokens sent to the engine.", registry=registry
        )
        self.truncated = Counter("lift_truncated_captions", "Captions that were cut.", registry=registry)
        self.rejected = Counter("lift_rejected_vectors", "Vectors that may not be stored.", registry=registry)

        self.cache_rows = Gauge("lift_cache_rows", "Captions in the cache.", registry=registry)
        self.cache_bytes = Gauge("lift_cache_bytes", "Bytes of the cache on disk.", registry=registry)

    def describe(self, *, version: str, engine: str, model: str, recipe: str) -> None:
        """What `lift_build_info` says; recipe is a fingerprint."""
        self.build.info({"version": version, "engine": engine, "model": model, "recipe": recipe})

    def watch_cache(self, rows: Callable[[], float], size: Callable[[], float]) -> None:
        """Ask for rows and size (bytes) whenever the metrics are rendered; both must be quick."""
        self.cache_rows.set_function(rows)
        self.cache_bytes.set_function(size)

    def render(self) -> bytes:
        """Prometheus text format 0.0.4."""
        return generate_latest(self.registry)
