"""`live.json`: what the live tier beside it must be, so that a missing or an older one is noticed.

Rows that are not sealed are in `live/` alone. Were that directory deleted, or put back from a copy, everything left
would be right, and those rows would be missing without a word. This file, written durably when a writer opens and
when it closes, names the tier and its generation, and says how many rows it had that were not sealed. It speaks of
its own directory only: a copy of a cache, made without `live/`, is a cache of what was sealed.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from lift_cache.files import write_atomic


class Witness(BaseModel):
    """
    Attributes:
        directory: inode of the cache's directory, by which a copy is told from the original.
        tier: random name of the live tier.
        generation: how often a writer had opened it.
        fresh: rows that were not sealed when the writer closed; None while it is open, or was killed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    directory: int
    tier: str
    generation: int
    fresh: int | None

    def save(self, cache: Path) -> None:
        """Raises CacheFull, OSError."""
        write_atomic(cache / "live.json", (self.model_dump_json(indent=2) + "\n").encode())

    def missing(self, tier: str | None, generation: int) -> str | None:
        """What is lost when the live tier is this one (None: there is none); None when nothing is."""
        if self.fresh == 0 or (tier == self.tier and generation >= self.generation):
            return None
        rows = (
            "rows that were not sealed" if self.fresh is None else f"{self.fresh} rows that were not sealed"
        )
        what = "is missing" if tier is None else "is an older copy, or another cache's"
        return (
            f"{what}, and with it {rows}; put the right one back, or let `lift-cache repair` go on without them "
            "and fill again"
        )


def witness_of(cache: Path) -> Witness | None:
    """What was written for this directory; None where there is nothing, or a copy of another's."""
    try:
        witness = Witness.model_validate_json((cache / "live.json").read_bytes())
    except (OSError, ValidationError):
        return None
    return witness if witness.directory == cache.stat().st_ino else None


def lost(cache: Path) -> str | None:
    """What a missing live tier has taken with it; None when there is a tier, or nothing is lost."""
    witness = witness_of(cache)
    if witness is None or (cache / "live" / "data.mdb").exists():
        return None
    said = witness.missing(None, 0)
    return said and f"{cache / 'live'} {said}"
