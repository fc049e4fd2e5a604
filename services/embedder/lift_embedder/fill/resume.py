"""Which files need not be read again: those with a mark that the cache still bears out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lift_embedder.fill.ledger import failed_by_file
from lift_embedder.fill.marks import Mark, Marks
from lift_embedder.fill.targets import Target

TOGETHER = 32
"""Files whose captions are asked for in one request."""


@dataclass(frozen=True)
class Work:
    """What there is to do: files to read. Of those that are done, their names and how many rows they have."""

    read: list[Path]
    done: frozenset[str] = frozenset()
    rows_done: int = 0


def remaining_work(
    paths: Sequence[Path], marks: Marks, ledger: Path, target: Target, say: Callable[[str], None]
) -> Work:
    """Look at the marks of all files, and ask the cache for the captions in them. Raises ServerUnavailable.

    A file is also read again when not all of its rows that were left out are in `ledger`.
    """
    failed = failed_by_file(ledger)
    done: set[str] = set()
    rows_done = 0
    gone: list[Path] = []
    candidates = iter(
        (path, mark)
        for path in paths
        if (mark := _of_file(path, marks)) is not None and mark.rejected == failed[mark.path]
    )
    while together := list(islice(candidates, TOGETHER)):
        asked = {path: mark for path, mark in together if mark.cache_rows <= target.rows}
        captions = [caption for mark in asked.values() for caption in mark.samples]
        found = iter(target.found(captions).tolist() if captions else [])
        for path, mark in together:
            if path in asked and all(list(islice(found, len(mark.samples)))):
                done.add(mark.path)
                rows_done += mark.rows
            else:
                gone.append(path)
    if gone:
        say(
            f"{len(gone):,} files were done before, but the cache lacks captions of them (it is another one, or "
            f"an older copy); they are read again, the first: {gone[0]}"
        )
    read = [path for path in paths if str(path.absolute()) not in done]
    return Work(read, frozenset(done), rows_done)


def _of_file(path: Path, marks: Marks) -> Mark | None:
    """The mark of a file, where it is of the file as it is now."""
    mark = marks.load(path.absolute())
    if mark is None or not mark.can_be_proved:
        return None
    try:
        stat = path.stat()
    except OSError:
        return None
    return mark if mark.of_file(stat.st_size, stat.st_mtime_ns) else None
