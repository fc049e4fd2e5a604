"""Snapshots: immutable views of a cache, which trainers read.

    snapshots/<n>-<digest>/
        index-<k>.arrow, prefix-<k>.arrow    the index: a base and, over a large one, a few deltas
        manifest.json                        written last: segments, rows, checksums, recipe, encoding

The id is a sequence number and the digest of the manifest, never a clock. A snapshot is itself the pin:
no segment that a snapshot names is ever removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from lift_cache import files
from lift_cache.encoding import Encoding
from lift_cache.errors import CacheDamaged, CacheNotFound, UnsupportedFormat
from lift_cache.index import (
    ROW_BYTES,
    FileInfo,
    IndexPart,
    OpenIndex,
    build_index,
    index_name,
    prefix_name,
    require_file,
)
from lift_cache.recipe import Recipe
from lift_cache.segment import FORMAT_VERSION, Segment, SegmentInfo

DELTA_FROM = 1 << 20
"""Rows of an index from which on a new snapshot adds a delta to it, instead of writing it again."""

DELTA_SHARE = 4
"""A delta has at most one row for so many that the parts before it have."""

MAX_PARTS = 4

REPLACE = "remove that snapshot (`lift-cache snapshot rm`) and make a new one"

_NAME = re.compile(r"(\d{6,})-([0-9a-f]{16})")


class Manifest(BaseModel):
    """The whole of what a snapshot is. Counts are over distinct captions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = 2
    sequence: int
    rows: int
    tokens: int
    truncated: int
    recipe: Recipe
    fingerprint: str
    encoding: Encoding
    segments: tuple[SegmentInfo, ...]
    index: tuple[IndexPart, ...]
    provenance: tuple[dict[str, Any], ...]

    def to_bytes(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()


class ManifestV1(BaseModel):
    """Format 1: one index, whose columns are `key_high`, `key_low`, `segment` and `row`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1]
    sequence: int
    rows: int
    tokens: int
    truncated: int
    recipe: Recipe
    fingerprint: str
    encoding: Encoding
    segments: tuple[SegmentInfo, ...]
    index: FileInfo
    prefix: FileInfo
    prefix_bits: int
    provenance: tuple[dict[str, Any], ...]

    def upgraded(self) -> Manifest:
        """As format 2 says it. Its index is not taken over: a reader makes its own."""
        same = self.model_dump(exclude={"format", "index", "prefix", "prefix_bits"})
        return Manifest(index=(), **same)


@dataclass(frozen=True)
class Snapshot:
    """A snapshot's id, its directory and the number of its rows."""

    id: str
    path: Path
    rows: int


def snapshots_of(cache: Path) -> list[str]:
    """Ids of the snapshots of a cache, oldest first."""
    directory = cache / "snapshots"
    if not directory.is_dir():
        return []
    found = [
        (int(match[1]), path.name) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))
    ]
    return [name for _, name in sorted(found)]


def split_location(location: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """`PATH` or `PATH@ID` into its two parts."""
    text = os.fspath(location)
    if not Path(text).exists() and "@" in text:
        path, _, snapshot = text.rpartition("@")
        return Path(path), snapshot
    return Path(text), None


def find_snapshot(cache: Path, wanted: str | None) -> str:
    """Full id of the wanted snapshot (an id or its beginning), by default the newest.

    Raises:
        CacheNotFound: says what there is instead.
    """
    if not (cache / "recipe.json").is_file() and not (cache / "snapshots").is_dir():
        raise CacheNotFound(
            f"{cache} is not a cache (no recipe.json); check the path, or fill one with `lift-embed`"
        )
    have = snapshots_of(cache)
    if not have:
        raise CacheNotFound(f"{cache} has no snapshot yet; make one with `lift-cache snapshot {cache}`")
    if wanted is None:
        return have[-1]
    matching = [name for name in have if name.startswith(wanted) or str(int(name.split("-")[0])) == wanted]
    if len(matching) != 1:
        raise CacheNotFound(f"{cache} has no single snapshot {wanted!r}; it has {', '.join(have[-5:])}")
    return matching[0]


def parse_manifest(data: bytes, where: str) -> Manifest | ManifestV1:
    """A manifest from its bytes. Raises CacheDamaged, UnsupportedFormat."""
    try:
        parsed = json.loads(data)
        version = parsed["format"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UnsupportedFormat(
                f"{where} has format version {version}; this software reads {FORMAT_VERSION}: update it"
            )
        kind = ManifestV1 if version == 1 else Manifest
        return kind.model_validate(parsed)
    except (ValueError, KeyError, TypeError, ValidationError):
        raise CacheDamaged(f"{where} cannot be read; {REPLACE}") from None


def load_stored_manifest(cache: Path, snapshot_id: str) -> Manifest | ManifestV1:
    """Read and check a manifest, in the format in which it is stored. Raises as `load_manifest`."""
    path = cache / "snapshots" / snapshot_id / "manifest.json"
    try:
        data = path.read_bytes()
    except PermissionError:
        raise
    except OSError:
        raise CacheDamaged(f"{path} cannot be read; {REPLACE}") from None
    manifest = parse_manifest(data, str(path))
    if digest_of_manifest(data) != snapshot_id.split("-")[1]:
        raise CacheDamaged(f"{path}: its bytes are not those its name stands for; {REPLACE}")
    return manifest


def load_manifest(cache: Path, snapshot_id: str) -> Manifest:
    """Read and check a manifest. Raises CacheDamaged, UnsupportedFormat, PermissionError."""
    manifest = load_stored_manifest(cache, snapshot_id)
    return manifest.upgraded() if isinstance(manifest, ManifestV1) else manifest


def snapshot_files(manifest: Manifest | ManifestV1) -> dict[str, FileInfo]:
    """The files of a snapshot's directory, its manifest apart: name → size and digest."""
    if isinstance(manifest, ManifestV1):
        return {"index.arrow": manifest.index, "prefix.arrow": manifest.prefix}
    found = {}
    for number, part in enumerate(manifest.index):
        found[index_name(number)] = part.index
        found[prefix_name(number)] = part.prefix
    return found


def build_snapshot(
    cache: Path,
    recipe: Recipe,
    encoding: Encoding,
    segments: Sequence[SegmentInfo],
    provenance: Sequence[dict[str, Any]] = (),
    progress: Callable[[int], None] = lambda _: None,
) -> Snapshot:
    """Write a snapshot over sealed segments; where two hold the same key, the first named wins.

    The newest snapshot is returned as it is when it already covers the same segments. Parts of its index that
    are still right are linked, not written again.

    Args:
        progress: called with the rows that were indexed.

    Raises:
        CacheFull: no room; no snapshot was made.
        CacheDamaged: a segment cannot be read.
    """
    have = snapshots_of(cache)
    newest = _whole_manifest(cache, have[-1]) if have else None
    if newest and newest.index and {info.id for info in newest.segments} == {info.id for info in segments}:
        return Snapshot(have[-1], cache / "snapshots" / have[-1], newest.rows)
    sequence = 1 + _last_number(cache)
    directory = cache / "snapshots"
    files.make_directory(directory)
    old = directory / have[-1] if have else directory
    kept = reusable_parts(newest.index, segments) if newest else ()
    covered = {segment_id for part in kept for segment_id in part.segments}
    added = [Segment(cache / "segments", info.id) for info in segments if info.id not in covered]
    files.require_room(directory, 3 * ROW_BYTES * sum(segment.rows for segment in added), "a snapshot")
    temporary = files.temporary_name(directory / "snapshot")
    with files.room_for(directory):
        try:
            temporary.mkdir()
            for number in range(len(kept)):
                for name in (index_name(number), prefix_name(number)):
                    files.link_or_copy(old / name, temporary / name)
            earlier = [OpenIndex.open(temporary, number, part) for number, part in enumerate(kept)]

            def known(keys: np.ndarray) -> np.ndarray:
                return np.logical_or.reduce([part.lookup(keys) >= 0 for part in earlier])

            parts = [*kept]
            if added or not kept:
                parts.append(build_index(temporary, len(kept), added, known if earlier else None, progress))
            manifest = Manifest(
                sequence=sequence,
                rows=sum(part.rows for part in parts),
                tokens=sum(part.tokens for part in parts),
                truncated=sum(part.truncated for part in parts),
                recipe=recipe,
                fingerprint=recipe.fingerprint,
                encoding=encoding,
                segments=tuple(segments),
                index=tuple(parts),
                provenance=tuple(provenance),
            )
            data = manifest.to_bytes()
            (temporary / "manifest.json").write_bytes(data)
            files.sync_file(temporary / "manifest.json")
            for path in (temporary, *temporary.iterdir()):
                files.share_with_group(path)
            files.sync_directory(temporary)
            name = f"{sequence:06d}-{digest_of_manifest(data)}"
            temporary.rename(directory / name)
            files.sync_directory(directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Snapshot(name, directory / name, manifest.rows)


def reusable_parts(parts: Sequence[IndexPart], segments: Sequence[SegmentInfo]) -> tuple[IndexPart, ...]:
    """The parts of an index that a new snapshot over these segments keeps: the rest becomes one delta.

    None are kept when the index is small, or what would be the delta is too large beside them.
    """
    rows = {info.id: info.rows for info in segments}
    kept: list[IndexPart] = []
    for part in parts[: MAX_PARTS - 1]:
        if not all(segment_id in rows for segment_id in part.segments):
            break
        kept.append(part)
    while kept:
        covered = {segment_id for part in kept for segment_id in part.segments}
        new = sum(count for segment_id, count in rows.items() if segment_id not in covered)
        size = sum(part.rows for part in kept)
        if size >= DELTA_FROM and new * DELTA_SHARE <= size:
            break
        kept.pop()
    return tuple(kept)


def remove_snapshot(cache: Path, snapshot_id: str) -> None:
    """Remove a snapshot's directory; what it alone names becomes collectable. Only the writer may call this."""
    directory = cache / "snapshots"
    if snapshot_id == snapshots_of(cache)[-1]:  # no number ever stands for two snapshots
        files.write_atomic(directory / "removed", f"{_last_number(cache)}\n".encode())
    gone = files.temporary_name(directory / snapshot_id)
    (directory / snapshot_id).rename(gone)  # at once: half of a snapshot is never seen under its name
    files.sync_directory(directory)
    shutil.rmtree(gone)


def _last_number(cache: Path) -> int:
    """The highest number that a snapshot of a cache has, or had."""
    have = snapshots_of(cache)
    numbers = [int(name.split("-")[0]) for name in have[-1:]]
    with contextlib.suppress(OSError, ValueError):
        numbers.append(int((cache / "snapshots" / "removed").read_text()))
    return max(numbers, default=0)


def _whole_manifest(cache: Path, snapshot_id: str) -> Manifest | None:
    """The manifest of a snapshot whose files are all as they were written, else None."""
    try:
        require_index(cache, snapshot_id)
        return load_manifest(cache, snapshot_id)
    except CacheDamaged:
        return None


def require_index(cache: Path, snapshot_id: str) -> None:
    """Read every byte of a snapshot's own files. Raises CacheDamaged."""
    manifest = load_stored_manifest(cache, snapshot_id)
    for name, info in snapshot_files(manifest).items():
        require_file(cache / "snapshots" / snapshot_id / name, info)


def digest_of_manifest(manifest: bytes) -> str:
    """What a snapshot's name ends with: BLAKE2b-64, 16 hex digits."""
    return hashlib.blake2b(manifest, digest_size=8).hexdigest()
