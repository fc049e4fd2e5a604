"""Checking every byte of a cache."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lift_cache.encoding import Encoding
from lift_cache.errors import CacheDamaged, CacheLocked, CacheNotFound, LiftError
from lift_cache.lock import WriterLock
from lift_cache.reader import CacheReader
from lift_cache.recipe import Recipe
from lift_cache.segment import check_segment, segment_ids
from lift_cache.snapshot import load_manifest, require_index, snapshots_of


@dataclass
class VerifyReport:
    """What was read and what was wrong with it, one line each."""

    segments: int = 0
    rows: int = 0
    snapshots: int = 0
    live: str = "absent"
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(self.__dict__, indent=2)


def verify(path: str | os.PathLike[str], progress: Callable[[str], None] = lambda _: None) -> VerifyReport:
    """Read everything: segments (bytes, row checksums, captions against keys), snapshots, and the rows that
    are not sealed yet when no writer holds the cache. Changes nothing.

    Raises:
        CacheNotFound: not a cache.
    """
    path = Path(path)
    report = VerifyReport()
    if not (path / "recipe.json").is_file() and not (path / "segments").is_dir():
        raise CacheNotFound(f"{path} is not a cache (no recipe.json); check the path")
    recipe = encoding = None
    for load in (Recipe.load, Encoding.load):
        name = "recipe.json" if load == Recipe.load else "encoding.json"
        try:
            loaded = load(path / name)
        except FileNotFoundError:
            report.problems.append(f"{path / name} is missing")
        except LiftError as error:
            report.problems.append(str(error))
        else:
            recipe = loaded if isinstance(loaded, Recipe) else recipe
            encoding = loaded if isinstance(loaded, Encoding) else encoding
    for segment_id in segment_ids(path / "segments"):
        progress(f"segment {segment_id}")
        report.segments += 1
        try:
            segment = check_segment(path / "segments", segment_id, need_captions=False)
            report.rows += segment.rows
            if recipe is not None:
                recipe.require_same(segment.recipe, here="recipe.json", there=segment.path.name)
            if encoding is not None:
                encoding.require_same(segment.encoding, here="encoding.json", there=segment.path.name)
        except LiftError as error:
            report.problems.append(str(error))
    for snapshot_id in snapshots_of(path):
        progress(f"snapshot {snapshot_id}")
        report.snapshots += 1
        try:
            _verify_snapshot(path, snapshot_id)
        except LiftError as error:
            report.problems.append(str(error))
    if (path / "live").is_dir() and recipe is not None and encoding is not None:
        report.live = _verify_live(path, recipe, encoding, report.problems)
    return report


def _verify_snapshot(path: Path, snapshot_id: str) -> None:
    require_index(path, snapshot_id, load_manifest(path, snapshot_id))
    CacheReader(f"{path}@{snapshot_id}")


def _verify_live(path: Path, recipe: Recipe, encoding: Encoding, problems: list[str]) -> str:
    try:
        from lift_cache.live import LiveTier  # readers have no LMDB
    except ImportError:
        return "not checked: lmdb is not installed here (it is only needed by the writer)"
    try:
        lock = WriterLock(path)
    except CacheLocked:
        return "not checked: a writer is at work; stop it to check the rows that are not sealed yet"
    except OSError as error:
        return f"not checked: the writer's lock cannot be taken here ({error.strerror})"
    try:
        live = LiveTier(path / "live", recipe.fingerprint, encoding, readonly=True)
    except LiftError as error:
        problems.append(str(error))
        return "cannot be opened"
    else:
        fresh = 0
        for number in live.fresh_numbers():
            try:
                fresh += len(live.require_fresh(number) or ())
            except CacheDamaged as error:
                problems.append(str(error))
        sealed = set(segment_ids(path / "segments"))
        problems += [
            f"segment {info.id} is missing, with {info.rows} rows; restore it from a copy of the cache"
            for info in live.registry().values()
            if info.id not in sealed
        ]
        live.close()
        return f"checked: {fresh} rows not sealed yet"
    finally:
        lock.release()
