"""Keeping books: what became of every row, and which files are done.

A file is done when all of it was read and every caption of it, and of the files before it, was answered: equal
captions are sent once, so a file may count on what an earlier one sent.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lift_cache.errors import BadSource
from lift_cache.wire import RowError
from lift_embedder.fill.ledger import FIRST, FailedRow, Ledger
from lift_embedder.fill.marks import Mark, Marks, Samples
from lift_embedder.fill.summary import Summary

NAMED_BAD = 20
"""Rows left out that are printed one by one; the ledger has them all."""


class TooManyBad(BadSource):
    """More rows left out than `--max-bad`."""


@dataclass(eq=False)
class Source:
    """A source file on its way.

    Attributes:
        path: as it was given.
        rows: read so far; `captions` of these are usable and of this shard, `rejected` are left out.
        waiting: captions that were taken and not answered yet.
        read: all of it was read.
    """

    path: Path
    size: int = 0
    mtime_ns: int = 0
    rows: int = 0
    captions: int = 0
    rejected: int = 0
    waiting: int = 0
    read: bool = False
    samples: Samples = field(default_factory=Samples)

    @property
    def name(self) -> str:
        """Under which marks and ledger know it."""
        return str(self.path.absolute())


class Item(NamedTuple):
    """A caption on its way: normalised, and the place it was read from."""

    text: str
    where: str
    source: Source


@dataclass(frozen=True)
class Answer:
    """What a cache said to n captions: cached bool [n] · tokens int32 [n] · truncated bool [n] · position → error."""

    cached: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray
    errors: dict[int, RowError] = field(default_factory=dict)


class Books:
    """Counts, marks and ledger of one run. Thread-safe; `summary` and the open `Source`s are changed here alone."""

    def __init__(
        self,
        summary: Summary,
        *,
        marks: Marks | None,
        ledger: Ledger | None,
        max_bad: int,
        cache_rows: int,
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            marks: where files that are done are noted; None notes nothing.
            ledger: where rows that are left out are noted; None notes nothing.
            cache_rows: captions that the cache has to begin with.
        """
        self.summary = summary
        self.first_answer: float | None = None
        self._marks, self._ledger, self._max_bad, self._say = marks, ledger, max_bad, say
        self._cache_rows = cache_rows
        self._lock = threading.RLock()
        self._open: deque[Source] = deque()
        self._closed = False
        self._named = 0

    def begin(self, path: Path) -> Source:
        """A file that is about to be read. Raises BadSource when it is not there any more."""
        try:
            stat = path.stat()
        except OSError as error:
            raise BadSource(f"{path}: {error.strerror or error}") from error
        source = Source(path, stat.st_size, stat.st_mtime_ns)
        with self._lock:
            self._open.append(source)
        return source

    def row(self, source: Source) -> None:
        """A row was read."""
        source.rows += 1
        self.summary.rows += 1

    def usable(self, source: Source, texts: Sequence[str]) -> None:
        """Captions of this shard, in their order."""
        with self._lock:
            source.captions += len(texts)
            source.samples.read(texts)
            self.summary.captions += len(texts)

    def unique(self, count: int, *, at_least: bool) -> None:
        with self._lock:
            self.summary.unique += count
            self.summary.unique_is_least |= at_least

    def already_there(self, count: int) -> None:
        """Captions that need not be sent."""
        with self._lock:
            self.summary.cached += count

    def taken(self, source: Source, count: int) -> None:
        """Captions that will be sent, and answered."""
        with self._lock:
            source.waiting += count

    def read(self, source: Source) -> None:
        """The end of the file was reached."""
        with self._lock:
            source.read = True
            self._finish_files()

    def answered(self, items: Sequence[Item], answer: Answer) -> None:
        """What the cache answered. Raises TooManyBad, CacheFull, OSError."""
        with self._lock:
            if self._closed:
                return  # came after the end of the run was written down
            if self.first_answer is None:
                self.first_answer = time.monotonic()
            for position, error in sorted(answer.errors.items()):
                item = items[position]
                item.source.samples.left_out(item.text)
                self.left_out(item.source, item.where, error.code, error.message, item.text)
            good = np.ones(len(items), bool)
            good[list(answer.errors)] = False
            new = good & ~answer.cached
            self.summary.cached += int((good & answer.cached).sum())
            self.summary.embedded += int(new.sum())
            self.summary.tokens += int(answer.tokens[new].sum())
            self.summary.truncated += int(answer.truncated[good].sum())
            for _, group in groupby(
                zip(items, new.tolist(), strict=True), key=lambda pair: id(pair[0].source)
            ):
                pairs = list(group)
                source = pairs[0][0].source
                source.waiting -= len(pairs)
                source.samples.stored([item.text for item, is_new in pairs if is_new])
            self._finish_files()

    def left_out(
        self, source: Source, where: str, code: str, reason: str, caption: str | None = None
    ) -> None:
        """A row that cannot be filled. Raises TooManyBad, CacheFull, OSError."""
        with self._lock:
            source.rejected += 1
            if self._ledger is not None:
                self._ledger.add(FailedRow(source.name, where, code, reason, caption))
            self.summary.rejected += 1
            self._named += 1
            if len(self.summary.first_rejected) < FIRST:
                self.summary.first_rejected.append(where)
            if self._named <= NAMED_BAD:
                self._say(f"left out {where}: {reason}")
            elif self._named == NAMED_BAD + 1:
                self._say("further rows that are left out are in the ledger, and not named here")
            self._limit(where, reason)

    def carry_over(self, ledger: Ledger) -> None:
        """Count the rows that earlier runs left out, of files that are done. Raises TooManyBad."""
        if ledger.kept:
            self.summary.rejected += ledger.kept
            self.summary.first_rejected += [row.where for row in ledger.first_kept]
            self._say(f"{ledger.kept:,} rows were left out before, of files that are done: {ledger.path}")
            self._limit(ledger.first_kept[-1].where, ledger.first_kept[-1].reason)

    def close(self) -> None:
        """Write the ledger out. Raises CacheFull, OSError."""
        with self._lock:
            self._closed = True
            if self._ledger is not None:
                self._ledger.close()
                if self._ledger.path.exists():
                    self.summary.failed = str(self._ledger.path)

    def _limit(self, where: str, reason: str) -> None:
        if self.summary.rejected > self._max_bad:
            raise TooManyBad(
                f"{self.summary.rejected:,} bad captions (the last: {where}: {reason}); mend the source, or "
                "allow more with --max-bad"
            )

    def _finish_files(self) -> None:
        while self._open and self._open[0].read and not self._open[0].waiting:
            self._mark(self._open.popleft())

    def _mark(self, source: Source) -> None:
        if self._marks is None:
            return
        try:
            stat = source.path.stat()
        except OSError:
            return
        if (stat.st_size, stat.st_mtime_ns) != (source.size, source.mtime_ns):
            return  # written to while it was read
        if self._ledger is not None:
            self._ledger.sync()  # a mark says that the rows left out are in the ledger
        self._marks.save(
            Mark(
                path=source.name,
                size=source.size,
                mtime_ns=source.mtime_ns,
                field=self._marks.field,
                fingerprint=self._marks.fingerprint,
                target=self._marks.target,
                shard=self._marks.shard,
                rows=source.rows,
                captions=source.captions,
                rejected=source.rejected,
                cache_rows=self._cache_rows + self.summary.embedded,
                samples=source.samples.kept(),
            )
        )
