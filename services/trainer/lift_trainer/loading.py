"""Ctrl-C while modules are loaded, which takes seconds with torch among them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def loading(interrupted: str) -> Iterator[None]:
    """Answer Ctrl-C inside with one line and status 130, at once.

    Not by an exception: extension modules swallow a KeyboardInterrupt, or make an ImportError of it. Only for
    imports, as nothing is cleaned up.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"interrupted: {interrupted}\n".encode())
        os._exit(128 + number)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # in the background of a shell script
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
