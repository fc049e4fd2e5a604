"""How far a run is: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar

from lift_embedder.fill.books import Source
from lift_embedder.fill.summary import Summary, duration

BAR_EVERY, LINE_EVERY = 0.5, 5.0
"""Seconds between two states."""

WINDOW = 120.0
"""Seconds over which the speed is taken."""


class Progress:
    """Shows the state of a run from a thread of its own, inside a `with` block."""

    def __init__(self, files: Sequence[Path], summary: Summary, console: Console) -> None:
        self._summary, self._console = summary, console
        self._sizes = {path: _size(path) for path in files}
        self._total = max(1, sum(self._sizes.values()))
        self._done = 0
        self._source: Source | None = None
        self._parquet_rows: dict[Path, int] = {}
        self._began = time.monotonic()
        self._seen: deque[tuple[float, float, int]] = deque([(self._began, 0.0, 0)])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def reading(self, source: Source | None) -> None:
        """The file that is read from now on; the one before is finished."""
        if self._source is not None:
            self._done += self._sizes.get(self._source.path, 0)
        self._source = source

    def share(self) -> float:
        """Of the bytes of all files, how much was read and answered: 0 to 1."""
        source, summary = self._source, self._summary
        here = 0.0 if source is None else self._read_of(source) * self._sizes.get(source.path, 0)
        answered = (summary.cached + summary.embedded) / max(1, summary.unique)
        return min(1.0, (self._done + here) / self._total) * min(1.0, answered)

    def line(self, share: float) -> str:
        """The state in words."""
        summary, now = self._summary, time.monotonic()
        answered = summary.cached + summary.embedded
        self._seen.append((now, share, answered))
        while now - self._seen[0][0] > WINDOW or (len(self._seen) > 1 and not self._seen[1][2]):
            self._seen.popleft()  # what is long ago, and the time in which the engine started
        then, share_then, answered_then = self._seen[0]
        rate = (answered - answered_then) / max(now - then, 1e-9)
        hits = summary.cached / answered if answered else 0.0
        said = (
            f"{summary.rows:,} rows, {rate:,.0f} captions/s, {hits:.0%} cached, {summary.rejected:,} rejected"
        )
        if share_then < share < 1:
            said += f", {duration((1 - share) * (now - then) / (share - share_then))} left"
        return said

    def _show(self) -> None:
        if not self._console.is_terminal:  # a bar in a log is no bar
            while not self._stop.wait(LINE_EVERY):
                share = self.share()
                self._console.print(f"fill: {share:.1%}, {self.line(share)}", highlight=False)
            return
        columns = (TextColumn("fill"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[line]}"))
        with Bar(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task("fill", total=1.0, line="")
            while not self._stop.wait(BAR_EVERY):
                share = self.share()
                bar.update(task, completed=share, line=self.line(share))

    def _read_of(self, source: Source) -> float:
        """Share of a file that was read, as far as can be told from outside."""
        if source.read:
            return 1.0
        if source.path.suffix == ".parquet":
            rows = self._parquet_rows.get(source.path)
            if rows is None:
                with contextlib.suppress(OSError, pa.ArrowException):
                    rows = pq.read_metadata(source.path).num_rows
                self._parquet_rows = {source.path: rows or 0}
            return min(1.0, source.rows / rows) if rows else 0.0
        position = position_of(source.path)
        return position / source.size if source.size else 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def position_of(path: Path) -> int:
    """How far this process has read an open file (Linux), compressed or not: bytes; 0 where that is not known."""
    name = str(path.resolve())
    for entry in _entries(Path("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if str(entry.readlink()) == name:
                about = Path("/proc/self/fdinfo", entry.name).read_text()
                if (position := int(about.split(maxsplit=2)[1])) > 0:
                    return position
    return 0


def _entries(directory: Path) -> list[Path]:
    try:
        return [directory / name for name in os.listdir(directory)]  # noqa: PTH208
    except OSError:
        return []
