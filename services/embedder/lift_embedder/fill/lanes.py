"""Lanes: one for each server that answers captions, with several requests under way in each.

Memory is bounded by what the queues hold: reading waits for the slowest lane.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from lift_embedder.fill.books import Answer, Item

QUEUED = 16
"""Requests that wait for a lane, so that the others go on for a while when a server is restarted."""

MOST_BYTES = 4 << 20
"""UTF-8 bytes of the captions of a request, whatever their number: well below what a server takes."""

LOOK = 0.2
"""Seconds between looks for a failure while something waits."""

Ask = Callable[[list[str]], Answer]


class Answered(Protocol):
    def __call__(self, items: Sequence[Item], answer: Answer, /) -> None: ...


class Lanes:
    """Sends captions in batches and hands the answers on. Used by one thread; the sending has its own.

    Raises from every method what a request, or `answered`, or `check` raised.
    """

    def __init__(
        self,
        asks: Sequence[Ask],
        answered: Answered,
        *,
        batch: int,
        concurrency: int,
        check: Callable[[], None],
    ) -> None:
        """
        Args:
            asks: one for each lane; called from `concurrency` threads each.
            answered: called with every answer, from these threads.
            batch: captions of a request.
            check: raises when waiting is in vain.
        """
        self._answered, self._batch, self._check = answered, batch, check
        self._failure: BaseException | None = None
        self._open: list[list[Item]] = [[] for _ in asks]
        self._bytes = [0 for _ in asks]
        self._queues: list[queue.Queue[list[Item] | None]] = [queue.Queue(QUEUED) for _ in asks]
        self._concurrency = concurrency
        # Daemons: one that waits for a server must not hold up Ctrl-C.
        self._senders = [
            threading.Thread(target=self._send_from, args=(ask, waiting), daemon=True)
            for ask, waiting in zip(asks, self._queues, strict=True)
            for _ in range(concurrency)
        ]
        for sender in self._senders:
            sender.start()

    def __len__(self) -> int:
        return len(self._queues)

    def add(self, lane: int, item: Item) -> None:
        """Send a caption, with others, some time before `finish` returns."""
        self._open[lane].append(item)
        self._bytes[lane] += len(item.text.encode())
        if len(self._open[lane]) >= self._batch or self._bytes[lane] >= MOST_BYTES:
            self._send(lane)

    def finish(self) -> None:
        """Wait until all is answered."""
        for lane in range(len(self)):
            if self._open[lane]:
                self._send(lane)
        for waiting in self._queues:
            for _ in range(self._concurrency):
                self._put(waiting, None)
        for sender in self._senders:
            while sender.is_alive():
                self.check()
                sender.join(LOOK)
        self.check()

    def stop(self) -> None:
        """Ask for nothing more; requests under way end by themselves."""
        if self._failure is None:
            self._failure = RuntimeError("stopped")

    def check(self) -> None:
        """Raises what made a lane fail."""
        if self._failure is not None:
            raise self._failure
        self._check()

    def _send(self, lane: int) -> None:
        items, self._open[lane], self._bytes[lane] = self._open[lane], [], 0
        self._put(self._queues[lane], items)

    def _put(self, waiting: queue.Queue[list[Item] | None], items: list[Item] | None) -> None:
        while True:
            self.check()
            try:
                waiting.put(items, timeout=LOOK)
                return
            except queue.Full:
                continue

    def _send_from(self, ask: Ask, waiting: queue.Queue[list[Item] | None]) -> None:
        while (items := waiting.get()) is not None:
            if self._failure is not None:
                return
            try:
                self._answered(items, ask([item.text for item in items]))
            except BaseException as error:
                if self._failure is None:
                    self._failure = error
                return
