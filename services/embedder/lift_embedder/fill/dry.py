"""A dry run: the same way through the sources, and a target that is only asked."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lift_cache.client import EmbeddingClient
from lift_cache.encoding import Encoding
from lift_cache.errors import LiftError
from lift_cache.keys import caption_keys
from lift_cache.tools import costs
from lift_cache.writer import CacheWriter
from lift_embedder.config import FillConfig
from lift_embedder.fill.books import Answer
from lift_embedder.fill.summary import Summary, duration
from lift_embedder.fill.targets import DEFAULT_SERVER, Target

TIMEOUT = 30.0
"""Seconds that a server may take to say what it has."""


class DryTarget(Target):
    """Says of captions whether a cache has them, where there is one to ask.

    Attributes:
        unknown: why nothing could be asked, if so.
        text_bytes: UTF-8 bytes of the captions that are not there.
    """

    def __init__(self, config: FillConfig) -> None:
        self.name, self.fingerprint, self.rows = "", None, 0
        self.unknown: str | None = None
        self.encoding: Encoding | None = None
        self.text_bytes = 0
        self.asks = [self._ask]
        self._lock = threading.Lock()
        self._cache: CacheWriter | None = None
        self._client: EmbeddingClient | None = None
        try:
            if config.cache is None:
                self._reach_server(config.server or DEFAULT_SERVER)
            else:
                self._open_cache(config.cache)
        except LiftError as error:
            self.unknown = str(error)

    def found(self, captions: list[str]) -> np.ndarray:
        if self._cache is not None:
            return self._cache.contains(caption_keys(captions))
        if self._client is not None and self.fingerprint is not None:
            return self._client.lookup(captions, vectors=False, on_error="return").found
        return np.zeros(len(captions), bool)

    def finish(self, *, snapshot: bool) -> str | None:
        self.interrupt()
        return None

    def interrupt(self) -> None:
        if self._client is not None:
            self._client.close()
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def _reach_server(self, url: str) -> None:
        self._client = EmbeddingClient(url, timeout=TIMEOUT, patience=0)
        info = self._client.info()
        self.name, self.fingerprint, self.rows = self._client.url, info.fingerprint, info.rows
        self.encoding = info.encoding

    def _open_cache(self, path: Path) -> None:
        self.name = f"cache:{path.absolute()}"
        if not (path / "recipe.json").is_file():
            self.unknown = f"{path} is not a cache yet"
            return
        self._cache = CacheWriter.open(path)
        self.fingerprint, self.rows = self._cache.recipe.fingerprint, self._cache.rows
        self.encoding = self._cache.encoding

    def _ask(self, captions: list[str]) -> Answer:
        found = self.found(captions)
        size = sum(len(caption.encode()) for caption, there in zip(captions, found, strict=True) if not there)
        with self._lock:
            self.text_bytes += size
        return Answer(found, np.zeros(len(captions), np.int32), np.zeros(len(captions), bool))


def outlook(summary: Summary, target: DryTarget, rate: float | None, sources: Sequence[str]) -> list[str]:
    """What the run would take, one line each.

    Args:
        rate: captions per second that the last run embedded into this cache, where there was one.
    """
    lines = []
    if target.unknown is not None:
        lines.append(f"what is cached is not known: {target.unknown}")
    if target.encoding is not None and summary.to_embed:
        sizes = costs.storage(summary.to_embed, target.text_bytes, target.encoding.dimensions)
        total = next(size.total for size in sizes if size.dtype == target.encoding.dtype)
        about = f"{target.encoding.dtype}, {target.encoding.dimensions:,} dimensions"
        lines.append(f"on disk: about {total / 1e6:,.1f} MB ({about})")
    if rate and summary.to_embed:
        time = duration(summary.to_embed / rate)
        lines.append(f"time: about {time}, at the {rate:,.0f} captions/s of the last run into this cache")
    lines.append(f"tokens, GPU-hours and other encodings: {shlex.join(['lift-cache', 'plan', *sources])}")
    return lines
