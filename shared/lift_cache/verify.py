"""Checking every byte of a cache."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lift_cache.encoding import Encoding
from lift_cache.errors import CacheDamaged, CacheLocked, CacheNotFound, LiftError
from lift_cache.lock import WriterLock
from lift_cache.provenance import provenance_of
from lift_cache.reader import CacheReader
from lift_cache.recipe import Recipe
from lift_cache.segment import CHECK_ROWS, Segment, check_segment, segment_ids
from lift_cache.snapshot import require_index, snapshots_of
from lift_cache.witness import lost


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
    """Read everything: segments (bytes, row checksums, captions against keys), snapshots, and the live tier
    (its fresh rows, and its index against the segments) when no writer holds the cache. Changes nothing.

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
    try:
        provenance_of(path)
    except LiftError as error:
        report.problems.append(str(error))
    good = []
    for segment_id in segment_ids(path / "segments"):
        progress(f"segment {segment_id}")
        report.segments += 1
        try:
            segment = check_segment(path / "segments", segment_id)
            report.rows += segment.rows
            good.append(segment)
            if recipe is not None:
                recipe.require_same(segment.recipe, here="recipe.json", there=segment.path.name)
            if encoding is not None:
                encoding.require_same(segment.encoding, here="encoding.json", there=segment.path.name)
        except LiftError as error:
            report.problems.append(str(error))
    report.problems += lost_captions(good)
    for snapshot_id in snapshots_of(path):
        progress(f"snapshot {snapshot_id}")
        report.snapshots += 1
        try:
            verify_snapshot(path, snapshot_id)
        except LiftError as error:
            report.problems.append(str(error))
    if said := lost(path):
        report.problems.append(said)
    if (path / "live" / "data.mdb").exists() and recipe is not None and encoding is not None:
        progress("live")
        report.live = _verify_live(path, report.problems)
    return report


def lost_captions(segments: list[Segment]) -> list[str]:
    """Segments whose captions are not here though others' are: not a copy that was made without captions."""
    lacking = [one for one in segments if one.captions_digest and not one.has_captions]
    if not any(one.has_captions for one in segments):
        return []
    return [
        f"the captions of {one.path} are missing; restore them from a copy (the vectors are all there)"
        for one in lacking
    ]


def verify_snapshot(path: Path, snapshot_id: str) -> None:
    """Read a snapshot's own files and open it. Raises CacheDamaged."""
    require_index(path, snapshot_id)
    CacheReader(f"{path}@{snapshot_id}")


def _verify_live(path: Path, problems: list[str]) -> str:
    try:
        import lift_cache.live  # noqa: F401  readers have no LMDB
    except ImportError:
        return "not checked: lmdb is not installed here (it is only needed by the writer)"
    try:
        lock = WriterLock(path)
    except CacheLocked:
        return "not checked: a writer is at work; stop it to check the rows that are not sealed yet"
    except OSError as error:
        return f"not checked: the writer's lock cannot be taken here ({error.strerror})"
    try:
        found = live_problems(path)
    finally:
        lock.release()
    problems += found[:-1]
    return found[-1]


def live_problems(path: Path) -> list[str]:
    """Walk the live tier in a process of its own: LMDB trusts its pages, and a damaged one can end the process.

    For a caller that holds the writer's lock.

    Returns:
        What is wrong, a line each; the last line says what was checked.
    """
    walk = subprocess.run(
        [sys.executable, "-m", "lift_cache.verify", str(path)], check=False, capture_output=True, text=True
    )
    found: list[str] = [json.loads(line) for line in walk.stdout.splitlines() if line.startswith('"')]
    if not walk.returncode and found and found[-1].startswith("checked: "):
        return found
    said = walk.stderr.strip().splitlines()[-1:] or [f"the check ended with status {walk.returncode}"]
    return [
        *found,
        f"{path / 'live'} is damaged ({said[0]}); `lift-cache repair` rebuilds it from the sealed segments "
        "(rows that were not sealed yet may have to be embedded again)",
        "cannot be read",
    ]


SEGMENT_ID = re.compile(r"[0-9a-f]{32}")


def walk_live(path: Path) -> Iterator[str]:
    """What is wrong with a cache's live tier, a line each; the last one is "checked: …".

    For a caller that holds the writer's lock.
    """
    from lift_cache.live import LiveTier

    recipe, encoding = Recipe.load(path / "recipe.json"), Encoding.load(path / "encoding.json")
    live = LiveTier(path / "live", recipe.fingerprint, encoding, readonly=True)
    if said := live.lost():
        yield said
    fresh = 0
    batches: dict[int, np.ndarray] = {}
    for number in live.fresh_numbers():
        try:
            rows = live.read_batch(number)
        except CacheDamaged as error:
            yield str(error)
            continue
        if rows is None:
            yield f"{live.path}: batch {number} is counted and not there"
            continue
        batches[number] = rows.keys
        fresh += len(rows)
        if not live.locations(rows.keys)[0].all():
            yield f"{live.path}: the index lacks rows of batch {number}"
    segments: dict[int, Segment] = {}
    there = set(segment_ids(path / "segments"))
    registry = live.registry()
    for number, info in registry.items():
        if info.id not in there:
            yield f"segment {info.id} is missing, with {info.rows} rows; restore it from a copy of the cache"
            continue
        try:
            segment = segments[number] = Segment(path / "segments", info.id)
        except LiftError:
            continue  # said where the segments were read
        for start in range(0, segment.rows, CHECK_ROWS):
            keys = segment.key_slice(start, min(start + CHECK_ROWS, segment.rows))
            if number not in live.pending() and not live.locations(keys)[0].all():
                yield f"{live.path}: the index lacks rows of segment {info.id}"
                break
    for keys, locations in live.index_items():
        unknown = ~np.isin(locations["segment"], (0, *registry))
        if unknown.any():
            yield f"{live.path}: {int(unknown.sum())} entries of the index point at segments that are not registered"
        yield from _wrong_locations(live.path, keys, locations, batches, segments, live.fresh_numbers())
    for old, others in live.retired().items():
        if not all(isinstance(name, str) and SEGMENT_ID.fullmatch(name) for name in (old, *others)):
            yield f"{live.path}: the list of segments that others took the place of is damaged, at {old!r}"
    indexed, counted = live.rows(), live.fresh_counts()[0] + live.sealed_counts()[0]
    if indexed != counted and not live.pending():
        yield f"{live.path}: the index has {indexed} rows and the counts say {counted}"
    live.close()
    yield f"checked: {fresh} rows not sealed yet"


def _wrong_locations(
    where: Path,
    keys: np.ndarray,
    locations: np.ndarray,
    batches: dict[int, np.ndarray],
    segments: dict[int, Segment],
    fresh: list[int],
) -> Iterator[str]:
    wrong = 0
    for number in np.unique(locations["segment"]).tolist():
        here = locations["segment"] == number
        if number:
            if number in segments:
                wrong += _mismatches(keys[here], locations["row"][here], segments[number])
            continue
        for batch in np.unique(locations["batch"][here]).tolist():
            mine = here & (locations["batch"] == batch)
            rows = locations["row"][mine].astype(np.int64)
            if batch in batches:
                inside = rows < len(batches[batch])
                wrong += int((~inside).sum())
                wrong += int((batches[batch][rows[inside]] != keys[mine][inside]).any(1).sum())
            elif batch not in fresh:
                wrong += int(mine.sum())
    if wrong:
        yield f"{where}: {wrong} entries of the index point at other rows"


def _mismatches(keys: np.ndarray, row: np.ndarray, segment: Segment) -> int:
    rows = row.astype(np.int64)
    inside = rows < segment.rows
    return int((~inside).sum()) + int((segment.keys(rows[inside]) != keys[inside]).any(1).sum())


if __name__ == "__main__":
    try:
        for found in walk_live(Path(sys.argv[1])):
            print(json.dumps(found), flush=True)
    except LiftError as error:
        print(json.dumps(str(error)), flush=True)
        print(json.dumps("checked: as far as it could be read"), flush=True)
