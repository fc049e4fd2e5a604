"""Clients that keep a server busy, and remember what it acknowledged."""

from __future__ import annotations

import base64
import itertools
import threading
from collections import Counter
from typing import Any

import httpx
import numpy as np

from lift_cache.keys import caption_keys

AWAY = 0
"""In place of a status: the connection was refused, or broke before there was an answer."""


class Load:
    """Threads that send captions nobody has sent before, until they are told to stop; as a context manager.

    Every other thread sends as bulk. `acknowledged` has the captions of all answers with status 200, and their
    vectors (base64, float32).
    """

    def __init__(self, url: str, *, threads: int = 6, captions: int = 20, words: str = "by the sea") -> None:
        self._url, self._captions, self._words = url, captions, words
        self._numbers = itertools.count()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._send, args=(bulk,), daemon=True)
            for bulk in itertools.islice(itertools.cycle((False, True)), threads)
        ]
        self.acknowledged: dict[str, str] = {}
        self.statuses: Counter[int] = Counter()
        self.errors: list[dict[str, Any]] = []

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a request has no end"

    def _send(self, bulk: bool) -> None:
        headers = {"X-Lift-Priority": "bulk" if bulk else "interactive"}
        with httpx.Client(base_url=self._url, timeout=90, headers=headers, trust_env=False) as client:
            while not self._stopping.is_set():
                captions = [
                    f"house number {next(self._numbers)} {self._words}" for _ in range(self._captions)
                ]
                body = {"input": captions, "encoding_format": "base64"}
                try:
                    answer = client.post("/v1/embeddings", json=body)
                except httpx.TransportError as error:
                    assert not isinstance(error, httpx.ReadTimeout), "a request has no end"
                    self.statuses[AWAY] += 1
                    self._stopping.wait(0.05)
                    continue
                self.statuses[answer.status_code] += 1
                if answer.status_code == 200:
                    rows = answer.json()["data"]
                    self.acknowledged |= {captions[row["index"]]: row["embedding"] for row in rows}
                else:
                    self.errors.append(answer.json()["error"])
                    self._stopping.wait(0.05)


def require_kept(cache: Any, load: Load) -> None:
    """Every acknowledged caption is in a cache (a reader or writer), with the vector that was answered."""
    captions = list(load.acknowledged)
    hits = cache.get(caption_keys(captions))
    assert hits.found.all(), f"{(~hits.found).sum()} of {len(captions)} acknowledged captions are lost"
    answered = np.stack([np.frombuffer(base64.b64decode(load.acknowledged[c]), "<f4") for c in captions])
    assert np.array_equal(hits.vectors, answered)
