"""What waits for the engine: bounded in tokens and bytes, interactive before bulk, in batches by tokens.

Two lanes. A batch is filled from the interactive lane first; every `BULK_TURN`-th batch from the bulk lane,
so that a fill goes on however busy the server is. Bulk may take only part of the room, so that a fill does not
shut everybody else out. Within a lane it is first come, first served by windows of a few batches, and in a
window the longest first: what shares a batch is then of about one length.

All of it belongs to the event loop; nothing here waits.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lift_cache.errors import LiftError
from lift_embedder.tokens import Tokens

BATCH_ROWS = 512
BULK_TURN = 8
BULK_SHARE = 0.75
"""Of the queue's room, what bulk work may take."""

WINDOW_BATCHES = 4

RATE_SECONDS = 30.0
"""How far back the measured rate looks."""


class QueueFull(LiftError):
    """More waits for the engine than the server accepts.

    Attributes:
        retry_after: seconds until there is likely to be room.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Computed:
    """One row as it is answered: vector float32 [d]."""

    vector: np.ndarray
    tokens: int
    truncated: bool


@dataclass(eq=False, slots=True)
class Wanted:
    """One input on its way through the engine."""

    key: bytes
    "Of the caption; for token ids, a name that nothing else has."
    caption: str | None
    "None for token ids, which are never cached."
    tokens: Tokens
    done: asyncio.Future[Computed]
    bulk: bool
    waiters: int = 0
    "Requests that want it."
    began: bool = False
    "It is in a batch: too late to leave."

    @property
    def cost(self) -> tuple[int, int]:
        """Tokens and bytes that it holds while it waits."""
        ids = len(self.tokens.ids)
        return ids, 8 * ids + len(self.caption or "") + ROW_BYTES


ROW_BYTES = 600
"""What a waiting row takes beside its ids and caption: objects, its future, its place in tables."""


@dataclass
class Rate:
    """Tokens per second of the last `RATE_SECONDS`, while there was work."""

    done: deque[tuple[float, int]] = field(default_factory=deque)
    busy_since: float | None = None
    last: float = 0.0

    def began(self) -> None:
        if self.busy_since is None:
            self.busy_since = time.monotonic()
            self.done.clear()

    def finished(self, tokens: int, *, idle: bool) -> None:
        now = time.monotonic()
        self.done.append((now, tokens))
        while self.done[0][0] < now - RATE_SECONDS:
            self.busy_since = self.done.popleft()[0]
        self.last = self.per_second or self.last
        if idle:
            self.busy_since = None

    @property
    def per_second(self) -> float:
        """0 before anything was measured."""
        if self.busy_since is None or not self.done:
            return self.last
        return sum(tokens for _, tokens in self.done) / max(time.monotonic() - self.busy_since, 1e-3)


class Queue:
    """Rows that wait and rows in the engine; their room is given back when they are answered or nobody waits."""

    def __init__(self, *, most_tokens: int, most_bytes: int, batch_tokens: int) -> None:
        self.most_tokens, self._most_bytes, self._batch_tokens = most_tokens, most_bytes, batch_tokens
        self._lanes = {bulk: _Lane(WINDOW_BATCHES * batch_tokens) for bulk in (False, True)}
        self._batches = 0
        self._work = asyncio.Event()
        self.tokens = self.bytes = self.rows = 0
        self.rate = Rate()

    def __len__(self) -> int:
        """Rows that are not in a batch yet."""
        return sum(len(lane) for lane in self._lanes.values())

    @property
    def retry_after(self) -> float:
        """Seconds until what waits now is likely to be done, 1 to 60."""
        rate = self.rate.per_second
        return min(max(self.tokens / rate if rate else 1.0, 1.0), 60.0)

    def require_room(self, tokens: int, size: int, *, bulk: bool) -> None:
        """Whether so much more may wait. More than the whole queue is taken when nothing waits.

        Raises:
            QueueFull.
        """
        share = BULK_SHARE if bulk else 1.0
        for have, more, most, what in (
            (self.tokens, tokens, self.most_tokens, "tokens"),
            (self.bytes, size, self._most_bytes, "bytes"),
        ):
            if have and have + more > share * most:
                raise QueueFull(
                    f"{have:,} {what} are waiting for the engine, and {more:,} more would exceed the "
                    f"{share * most:,.0f} that may wait; try again later",
                    self.retry_after,
                )

    def add(self, rows: Sequence[Wanted]) -> None:
        """Let rows wait; all of one class. Raises QueueFull: then none of them does."""
        if not rows:
            return
        tokens, size = map(sum, zip(*(row.cost for row in rows), strict=True))
        self.require_room(tokens, size, bulk=rows[0].bulk)
        self.tokens, self.bytes, self.rows = self.tokens + tokens, self.bytes + size, self.rows + len(rows)
        lane = self._lanes[rows[0].bulk]
        for row in rows:
            lane.add(row)
        self.rate.began()
        self._work.set()

    def hurry(self, row: Wanted) -> None:
        """Somebody waits for a bulk row now."""
        if row.bulk and not row.began and self._lanes[True].remove(row):
            row.bulk = False
            self._lanes[False].add(row)

    def leave(self, row: Wanted) -> bool:
        """Nobody wants a row any more: it gives its room back. False where it is being computed already."""
        if row.began:
            return False
        self._lanes[row.bulk].remove(row)
        self._give_back([row])
        return True

    async def batch(self) -> list[Wanted]:
        """The next rows for the engine, as soon as there are some."""
        while not len(self):
            self._work.clear()
            await self._work.wait()
        self._batches += 1
        first = self._batches % BULK_TURN == 0
        rows: list[Wanted] = []
        room = self._batch_tokens
        for bulk in (first, not first):
            more = self._lanes[bulk].take(room, BATCH_ROWS - len(rows), at_least_one=not rows)
            room -= sum(len(row.tokens.ids) for row in more)
            rows += more
        for row in rows:
            row.began = True
        return rows

    def finish(self, batch: Iterable[Wanted]) -> None:
        """Rows of a batch were answered, one way or the other."""
        self._give_back(batch)

    def drain(self) -> list[Wanted]:
        """All that waits; the queue is empty then."""
        rows = [row for lane in self._lanes.values() for row in lane.take(1 << 60, 1 << 60)]
        self._give_back(rows)
        return rows

    def _give_back(self, rows: Iterable[Wanted]) -> None:
        done = 0
        for row in rows:
            tokens, size = row.cost
            self.tokens, self.bytes, self.rows = self.tokens - tokens, self.bytes - size, self.rows - 1
            done += tokens if row.began else 0
        if done:
            self.rate.finished(done, idle=not self.rows)
        elif not self.rows:
            self.rate.busy_since = None


class _Lane:
    """First come, first served by windows of some tokens; in a window the longest first."""

    def __init__(self, window_tokens: int) -> None:
        self._window_tokens = window_tokens
        self._waiting: OrderedDict[bytes, Wanted] = OrderedDict()
        self._window: dict[bytes, Wanted] = {}  # shortest first, taken from its end

    def __len__(self) -> int:
        return len(self._waiting) + len(self._window)

    def add(self, row: Wanted) -> None:
        self._waiting[row.key] = row

    def remove(self, row: Wanted) -> bool:
        found = self._waiting.pop(row.key, None) or self._window.pop(row.key, None)
        return found is not None

    def take(self, tokens: int, rows: int, *, at_least_one: bool = True) -> list[Wanted]:
        """Rows of at most so many tokens together."""
        taken: list[Wanted] = []
        while len(self) and len(taken) < rows:
            if not self._window:
                self._next_window()
            key, row = self._window.popitem()
            tokens -= len(row.tokens.ids)
            if tokens < 0 and (taken or not at_least_one):
                self._window[key] = row
                break
            taken.append(row)
        return taken

    def _next_window(self) -> None:
        tokens = 0
        window: list[Wanted] = []
        while self._waiting and tokens < self._window_tokens:
            window.append(self._waiting.popitem(last=False)[1])
            tokens += len(window[-1].tokens.ids)
        window.sort(key=lambda row: len(row.tokens.ids))
        self._window = {row.key: row for row in window}
