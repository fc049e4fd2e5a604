"""The ledger of rows that were left out: JSON lines {"file", "where", "code", "reason", "caption"}.

It belongs to one set of sources. A run first drops the lines of every file that it is going to read, and then
writes down each row that fails as it comes, so that however a run ends no row is in it twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from lift_cache.files import TEMPORARY, publish, room_for

FIRST = 3
"""Rows left out that the end of a run names again."""


@dataclass(frozen=True, slots=True)
class FailedRow:
    """One row that was left out.

    Attributes:
        file: absolute path of its source file.
        where: its place, as a person looks for it.
        code: of the server's error table, or `unreadable_row`.
        caption: None where the row has none.
    """

    file: str
    where: str
    code: str
    reason: str
    caption: str | None = None

    def line(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None}) + "\n"


class Ledger:
    """A ledger being written. Thread-safe."""

    def __init__(self, path: Path, keep: Callable[[FailedRow], bool] = lambda row: False) -> None:
        """Begin, with those lines of an earlier run that are to be kept. Raises CacheFull, OSError."""
        self.path = path
        self._lock = threading.Lock()
        self._file: IO[str] | None = None
        self._unsynced = False
        self.kept = 0
        self.first_kept: list[FailedRow] = []
        if path.exists():
            with _replacing(path) as file:
                for row in read_ledger(path):
                    if keep(row):
                        file.write(row.line())
                        self.kept += 1
                        self.first_kept += [row] if self.kept <= FIRST else []
        self._empty = not self.kept

    def add(self, row: FailedRow) -> None:
        """Raises CacheFull, OSError."""
        with self._lock, room_for(self.path.parent):
            if self._file is None:
                self._file = self.path.open("a")
            self._file.write(row.line())
            self._empty, self._unsynced = False, True

    def sync(self) -> None:
        """Make every line durable. Raises CacheFull, OSError."""
        with self._lock, room_for(self.path.parent):
            if self._file is not None and self._unsynced:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._unsynced = False

    def close(self) -> None:
        """Also removes a ledger with no line in it."""
        self.sync()
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
            if self._empty:
                self.path.unlink(missing_ok=True)


def read_ledger(path: Path) -> Iterator[FailedRow]:
    """The lines of a ledger; none where there is no file. A line that a crash cut off is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield FailedRow(**json.loads(line))
            except (ValueError, TypeError):
                continue


def failed_by_file(path: Path) -> Counter[str]:
    """How many lines of a ledger each file has."""
    return Counter(row.file for row in read_ledger(path))


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[str]]:
    """A file that takes the place of another, durably, when it is complete."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    with room_for(path.parent):
        try:
            with temporary.open("w") as file:
                yield file
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
