"""One trainer per run, held by an open file descriptor as the cache's writer lock is."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from lift_cache.errors import CacheLocked

LOCK = "train.lock"

_held: set[int] = set()


@contextlib.contextmanager
def only_trainer(run: Path) -> Iterator[None]:
    """The exclusive right to train the run in an existing directory. Raises CacheLocked."""
    fd = os.open(run / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    _held.add(fd)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheLocked(
                f"{run} is being trained by another lift-train: wait for it, stop it, or use another --run"
            ) from None
        except OSError:
            pass  # a network file system without locks: runs, unlike caches, may lie there
        yield
    finally:
        _held.discard(fd)
        os.close(fd)


def _leave_to_the_parent() -> None:
    """Workers outlive a killed trainer by seconds, in which the same command must be able to go on."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_leave_to_the_parent)
