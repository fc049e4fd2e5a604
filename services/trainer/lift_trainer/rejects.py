"""Broken samples: each one named once, counted, and refused beyond a limit."""

from __future__ import annotations

import sys

from lift_cache.errors import BadSource

NAMED = 20
"""Lines printed one by one; after that the count speaks (every name stays in `Rejects.named`)."""


class Rejects:
    """What was left out, by place: "train-000.tar:0001" → "cannot identify image file"."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.named: dict[str, str] = {}

    def add(self, where: str, reason: str) -> None:
        """Name and count one broken sample; the same place twice counts once.

        A name that is not UTF-8 is spelt in ASCII, so that it comes back from a checkpoint as it was.

        Raises:
            BadSource: this is one more than the limit.
        """
        where = where.encode(errors="backslashreplace").decode()
        if where in self.named:
            return
        if len(self.named) >= self.limit:  # not noted: a run that goes on has to meet it again
            raise BadSource(
                f"{where}: {reason}; that makes {len(self.named) + 1} broken samples, more than --max-bad "
                f"{self.limit}: repair the data, or raise the limit to train without them"
            )
        self.named[where] = reason
        if len(self.named) <= NAMED:
            print(f"left out {where}: {reason}", file=sys.stderr)
        elif len(self.named) == NAMED + 1:
            print("further broken samples are counted only", file=sys.stderr)
