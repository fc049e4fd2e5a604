"""A child that finds this on its path cannot sync: as on a disk that fills up while it writes."""

import errno
import os


def _full(fd: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


os.fsync = _full
