"""What the routes work with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from lift_cache.writer import CacheWriter
from lift_embedder.history import History
from lift_embedder.metrics import Metrics
from lift_embedder.path import EmbeddingPath

T = TypeVar("T")

MOST_INPUTS = 2048
"""Captions per request; OpenAI's limit."""


@dataclass(frozen=True)
class Service:
    """One cache being served.

    names: what a request may call the model · shorter: the model was trained so that the first dimensions of
    a vector are a vector themselves (Matryoshka) · most_inputs: captions per request.
    """

    path: EmbeddingPath
    metrics: Metrics
    history: History
    names: frozenset[str]
    shorter: bool = False
    most_inputs: int = MOST_INPUTS
    _maintenance: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "maintenance"))

    @cached_property
    def fingerprint(self) -> str:
        """Of the cache's recipe."""
        return self.cache.recipe.fingerprint

    @property
    def cache(self) -> CacheWriter:
        return self.path.cache

    async def maintain(self, work: Callable[..., T], *args: Any, **settings: Any) -> T:
        """Run long work on the cache, one piece at a time, beside the threads that answer captions."""
        return await asyncio.get_running_loop().run_in_executor(
            self._maintenance, lambda: work(*args, **settings)
        )

    def close(self) -> None:
        self._maintenance.shutdown(wait=True, cancel_futures=True)
