"""What has written to a cache: engines and their versions, samples that were embedded again, conversions.

Not part of the recipe, because most of it changes no vector; every snapshot carries it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lift_cache.errors import CacheDamaged
from lift_cache.files import write_atomic

Entry = dict[str, Any]


def provenance_of(cache: Path) -> list[Entry]:
    """Entries in the order of first use. Raises CacheDamaged."""
    path = cache / "provenance.json"
    try:
        entries = json.loads(path.read_bytes()) if path.exists() else []
        return [dict(entry) for entry in entries]
    except (ValueError, TypeError):
        raise CacheDamaged(f"{path} cannot be read; restore it from a copy, or move it away") from None


def note_provenance(cache: Path, entry: Entry) -> None:
    """Add an entry that is not there yet, durably. Raises CacheDamaged, CacheFull."""
    known = provenance_of(cache)
    if entry not in known:
        save_provenance(cache, [*known, entry])


def save_provenance(cache: Path, entries: list[Entry]) -> None:
    write_atomic(cache / "provenance.json", (json.dumps(entries, indent=2) + "\n").encode())
