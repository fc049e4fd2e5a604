"""One writer per cache, held by an open file descriptor.

`flock` belongs to the descriptor, not to a process id, so containers whose process ids collide cannot
mistake each other for themselves, and the kernel releases it however the process ends. The descriptor is
not inheritable: an engine's child processes cannot keep a dead writer's lock. A child that was forked and
executes no other program closes its copy at once.
"""

from __future__ import annotations

import fcntl
import os
import time
import weakref
from pathlib import Path

from lift_cache import files
from lift_cache.errors import CacheLocked

ATTEMPTS = 10

_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()


class WriterLock:
    """Exclusive right to change a cache directory. Raises CacheLocked when another holds it."""

    def __init__(self, cache: Path) -> None:
        path = cache / "writer.lock"
        self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._take(self._fd, cache)
            files.share_with_group(path)
            _held.add(self)
        except BaseException:
            self.release()
            raise

    def _take(self, fd: int, cache: Path) -> None:
        # A process that is just being started holds every descriptor until its exec has closed them, an
        # instant after its parent goes on: one refusal does not mean that there is a writer.
        for _ in range(ATTEMPTS):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.05)
        raise CacheLocked(
            f"{cache} has a writer already (a server or another command): stop it, or send it captions over HTTP"
        )

    def release(self) -> None:
        """Let others write. Releasing twice does nothing."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def _leave_to_the_parent() -> None:
    for lock in _held:
        lock.release()  # closes this process's descriptor; the lock stays with the parent's


os.register_at_fork(after_in_child=_leave_to_the_parent)
