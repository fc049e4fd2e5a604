"""`seal`, `snapshot`, `compact`, `gc`, `merge`, `adopt`: what only the one writer may do to a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from lift_cache.errors import BadConfig
from lift_cache.tools.common import AsJson, CachePath, progress, say

snapshot_app = App(
    name="snapshot",
    help="Seal, then make an immutable view that trainers read; `rm` and `keep` remove old ones.",
)

DryRun = Annotated[bool, Parameter(negative="", help="Say what would be done, and change nothing.")]


def seal(cache: CachePath, *, as_json: AsJson = False) -> None:
    """Move every fresh row into sealed Arrow segments, so that `live/` holds nothing that is not elsewhere.

    Do this before an upgrade or a backup. A running server seals by itself; stop it first.
    """
    with open_writer(cache) as writer:
        rows = writer.seal()
        segments = writer.stats().segments
    say(as_json, {"sealed": rows, "segments": segments}, f"sealed {rows:,} rows; {segments:,} segments")


@snapshot_app.default
def snapshot(cache: CachePath, *, as_json: AsJson = False) -> None:
    """Seal, merge small segments, and make an immutable view that trainers read.

    Where there is nothing new, the newest snapshot is named again.
    """
    with open_writer(cache) as writer, progress(None, "rows") as advance:
        made = writer.snapshot(advance)
        freed = sum(removed.size for removed in writer.gc(dry_run=True))
    text = f"snapshot {made.id}: {made.rows:,} captions; train with `lift-train --cache {cache}`"
    if freed:
        text += f"\n{freed / 1e6:,.1f} MB are in segments that no snapshot needs: `lift-cache gc {cache}`"
    say(as_json, {"id": made.id, "path": str(made.path), "rows": made.rows, "collectable": freed}, text)


@snapshot_app.command(name="rm")
def remove(
    cache: CachePath,
    snapshot: Annotated[str, Parameter(help="Its id, its number, or the beginning of its id.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Remove one snapshot. What it alone names is removed by the next `gc`, not now."""
    with open_writer(cache) as writer:
        gone = writer.remove_snapshot(snapshot)
    say(as_json, {"removed": [gone]}, f"removed snapshot {gone}; `lift-cache gc {cache}` frees its segments")


@snapshot_app.command
def keep(
    cache: CachePath,
    newest: Annotated[int, Parameter(help="How many to keep.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Remove all snapshots but the newest N."""
    if newest < 1:
        raise BadConfig(f"keep {newest}: at least 1; `snapshot rm` removes a snapshot by name")
    with open_writer(cache) as writer:
        gone = writer.keep_snapshots(newest)
    text = f"removed {len(gone)} snapshots" + (f": {', '.join(gone)}" if gone else "")
    say(as_json, {"removed": gone}, text)


def compact(
    cache: CachePath,
    *,
    everything: Annotated[
        bool, Parameter(name="--all", negative="", help="Merge everything, however few segments there are.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Merge small segments into larger ones. `snapshot` does so by itself when there are many.

    The segments that were merged stay until `gc`.
    """
    with open_writer(cache) as writer, progress(None, "rows") as advance:
        merged = writer.compact(everything=everything, progress=advance)
        segments = writer.stats().segments
    before = sum(len(one.replaced) for one in merged)
    text = f"merged {before} segments into {len(merged)}; {segments:,} segments"
    if not merged:
        text = f"nothing to merge: {segments:,} segments"
    values = {"merged": before, "into": [one.info.id for one in merged], "segments": segments}
    say(as_json, values, text)


def gc(cache: CachePath, *, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Remove segments that merged ones have taken the place of and that no snapshot names.

    Nothing else is ever removed: no row that the cache has can be lost by this.
    """
    with open_writer(cache) as writer:
        removed = writer.gc(dry_run=dry_run)
    size = sum(one.size for one in removed)
    did = "would remove" if dry_run else "removed"
    values = {"removed": [str(one.path) for one in removed], "bytes": size, "dry_run": dry_run}
    say(as_json, values, f"{did} {len(removed)} files, {size / 1e6:,.1f} MB")


def merge(
    cache: CachePath,
    *sources: Annotated[Path, Parameter(help="Caches of the same recipe and encoding.")],
    as_json: AsJson = False,
) -> None:
    """Add the rows of other caches to this one; a caption that is here already keeps its vector.

    Sources stay as they are. Where all rows of a segment are new, its file is linked, not copied.
    """
    _merge(cache, sources, "merge", as_json)


def adopt(
    cache: CachePath,
    *sources: Annotated[Path, Parameter(help="Directories of segments, as bulk jobs write them.")],
    as_json: AsJson = False,
) -> None:
    """Add segments that were written elsewhere (by bulk jobs, or copied); each is proved first.

    Example: `lift-cache adopt CACHE parts/0/segments parts/1/segments`
    """
    _merge(cache, sources, "adopt", as_json)


def _merge(cache: Path, sources: tuple[Path, ...], what: str, as_json: bool) -> None:
    if not sources:
        raise BadConfig(f"{what}: name at least one source")
    added = present = segments = 0
    with open_writer(cache) as writer, progress(None, "rows") as advance:
        for source in sources:
            result = writer.merge(source, advance)
            added, present = added + result.added, present + result.present
            segments += result.segments
    values = {"added": added, "present": present, "segments": segments}
    text = f"added {added:,} rows in {segments:,} segments; {present:,} were here already"
    if added:
        text += f"\ntrainers see them after `lift-cache snapshot {cache}`"
    say(as_json, values, text)


def open_writer(cache: Path) -> Any:
    """An existing cache, open for writing. Raises BadConfig where LMDB is not installed."""
    return _writer_class().open(cache)


def _writer_class() -> Any:
    try:
        from lift_cache.writer import CacheWriter  # readers have no LMDB
    except ImportError:
        raise BadConfig(
            "lmdb is not installed here; run this where the embedder is, or install lift-cache[writer]"
        ) from None
    return CacheWriter
