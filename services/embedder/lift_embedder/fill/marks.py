"""What remembers that a source file is done: a mark, with captions that tell whether the cache still knows them.

A mark is a promise about a cache that may have been deleted, replaced, or restored from an older copy since. So
it carries captions of the file, among them some of the last that were put there, and is believed only while the
cache has these, and no fewer rows than it had.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from lift_cache.files import make_directory, write_atomic

SPREAD, END, STORED = 40, 8, 16
"""Captions that a mark keeps: spread over the file, at its end, and of those that were stored last."""

LONGEST = 4096
"""Characters of a caption that is kept; a file with longer ones alone gets no mark that can be believed."""


class Mark(BaseModel):
    """A source file all of whose captions were acknowledged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    path: str
    size: int
    mtime_ns: int
    field: str | None
    fingerprint: str
    target: str
    shard: str
    rows: int
    captions: int
    rejected: int
    cache_rows: int
    "Captions that the cache had at least when the mark was made."
    samples: tuple[str, ...]

    def of_file(self, size: int, mtime_ns: int) -> bool:
        """Whether the file is still the one that was read."""
        return (self.size, self.mtime_ns) == (size, mtime_ns)

    @property
    def can_be_proved(self) -> bool:
        """Whether there is something to ask the cache for, where there must be."""
        return bool(self.samples) or not self.captions


class Marks:
    """The marks of one kind of run: a target, its recipe, a field, a shard."""

    def __init__(
        self, state: Path, *, target: str, fingerprint: str, field: str | None, shard: tuple[int, int]
    ) -> None:
        self.target, self.fingerprint, self.field = target, fingerprint, field
        self.shard = "{}/{}".format(*shard)
        self._directory = state / "marks"

    def load(self, path: Path) -> Mark | None:
        """The mark of a file; None where there is none that can be read."""
        try:
            return Mark.model_validate_json(self._place(path).read_bytes())
        except (OSError, ValidationError):
            return None

    def save(self, mark: Mark) -> None:
        """Durably. Raises CacheFull, OSError."""
        place = self._place(Path(mark.path))
        make_directory(place.parent)
        write_atomic(place, mark.model_dump_json(indent=1).encode() + b"\n")

    def _place(self, path: Path) -> Path:
        name = digest(str(path), self.field, self.fingerprint, self.target, self.shard)
        return self._directory / name[:2] / f"{name}.json"


class Samples:
    """Some captions of a file that is being read, few however long it is. Used by one thread at a time."""

    def __init__(self) -> None:
        self._every, self._count = 1, 0
        self._spread: list[str] = []
        self._end: deque[str] = deque(maxlen=END)
        self._stored: list[str] = []

    def read(self, texts: Sequence[str]) -> None:
        """Captions in their order."""
        first = -self._count % self._every
        self._count += len(texts)
        for text in texts[first :: self._every]:
            if len(text) <= LONGEST:
                self._spread.append(text)
        self._end.extend(text for text in texts[-END:] if len(text) <= LONGEST)
        while len(self._spread) > SPREAD:
            self._spread = self._spread[::2]
            self._every *= 2

    def stored(self, texts: Sequence[str]) -> None:
        """Captions that one answer says are in the cache now; those of the latest answer are kept."""
        short = [text for text in texts if len(text) <= LONGEST]
        if short:
            self._stored = short[:: -(-len(short) // STORED)]

    def left_out(self, text: str) -> None:
        """A caption that the cache will not have."""
        self._spread = [kept for kept in self._spread if kept != text]
        self._end = deque((kept for kept in self._end if kept != text), END)

    def kept(self) -> tuple[str, ...]:
        """At most `SPREAD` + `END` + `STORED` distinct captions."""
        return tuple(dict.fromkeys([*self._spread, *self._end, *self._stored]))


def digest(*parts: object) -> str:
    """A name for a combination of values: 32 hex digits."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
