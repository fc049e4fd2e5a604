"""Snapshots: immutable views of a cache, which trainers read.

    snapshots/<n>-<digest>/
        index.arrow      sorted keys → (segment, row)
        prefix.arrow     where the keys that share their leading bits begin: makes lookup vectorised
        manifest.json    written last: segments, rows, checksums, recipe, encoding, provenance

The id is a sequence number and the digest of the manifest, never a clock. A snapshot is itself the pin:
no segment that a snapshot names is ever removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from lift_cache import files
from lift_cache.encoding import Encoding
from lift_cache.errors import CacheDamaged, CacheNotFound, UnsupportedFormat
from lift_cache.keys import halves
from lift_cache.recipe import Recipe
from lift_cache.segment import FORMAT_VERSION, Segment, SegmentInfo

ROWS_PER_BUCKET = 8
MAX_PREFIX_BITS = 26

INDEX_SCHEMA = pa.schema(
    [("key_high", pa.uint64()), ("key_low", pa.uint64()), ("segment", pa.uint32()), ("row", pa.uint32())]
)
PREFIX_SCHEMA = pa.schema([("first", pa.uint64())])

_NAME = re.compile(r"(\d{6,})-([0-9a-f]{16})")


class FileInfo(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    digest: str


class Manifest(BaseModel):
    """The whole of what a snapshot is. Counts are over distinct captions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
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

    def to_bytes(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()


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


def load_manifest(cache: Path, snapshot_id: str) -> Manifest:
    """Read and check a manifest. Raises CacheDamaged, UnsupportedFormat."""
    path = cache / "snapshots" / snapshot_id / "manifest.json"
    try:
        data = path.read_bytes()
        parsed = json.loads(data)
        if isinstance(parsed["format"], int) and parsed["format"] > FORMAT_VERSION:
            raise UnsupportedFormat(
                f"{path} has format version {parsed['format']}; this software reads {FORMAT_VERSION}: update it"
            )
        if _digest(data) != snapshot_id.split("-")[1]:
            raise CacheDamaged(f"{path}: its bytes are not those its name stands for; make a new snapshot")
        manifest = Manifest.model_validate(parsed)
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        raise CacheDamaged(f"{path} cannot be read; make a new snapshot") from None
    return manifest


def build_snapshot(
    cache: Path,
    recipe: Recipe,
    encoding: Encoding,
    segments: Sequence[SegmentInfo],
    provenance: Sequence[dict[str, Any]] = (),
) -> Snapshot:
    """Write a snapshot over sealed segments; where two hold the same key, the first named wins.

    The newest snapshot is returned as it is when it already covers the same segments.

    Raises:
        CacheFull: no room; no snapshot was made.
        CacheDamaged: a segment cannot be read.
    """
    have = snapshots_of(cache)
    newest = _whole_manifest(cache, have[-1]) if have else None
    if newest and {info.id for info in newest.segments} == {info.id for info in segments}:
        return Snapshot(have[-1], cache / "snapshots" / have[-1], newest.rows)
    sequence = 1 + (int(have[-1].split("-")[0]) if have else 0)
    directory = cache / "snapshots"
    files.make_directory(directory)
    temporary = files.temporary_name(directory / "snapshot")
    with files.room_for(directory):
        try:
            temporary.mkdir()
            index, rows, tokens, truncated = _merge_keys(cache, segments)
            bits = prefix_bits(rows)
            for name, batch in (("index.arrow", index), ("prefix.arrow", _prefix_batch(index, bits))):
                with (
                    pa.OSFile(str(temporary / name), "wb") as sink,
                    pa.ipc.new_file(sink, batch.schema) as writer,
                ):
                    writer.write_batch(batch)
                files.sync_file(temporary / name)
            manifest = Manifest(
                sequence=sequence,
                rows=rows,
                tokens=tokens,
                truncated=truncated,
                recipe=recipe,
                fingerprint=recipe.fingerprint,
                encoding=encoding,
                segments=tuple(segments),
                index=_file_info(temporary / "index.arrow"),
                prefix=_file_info(temporary / "prefix.arrow"),
                prefix_bits=bits,
                provenance=tuple(provenance),
            )
            data = manifest.to_bytes()
            (temporary / "manifest.json").write_bytes(data)
            files.sync_file(temporary / "manifest.json")
            for path in (temporary, *temporary.iterdir()):
                files.share_with_group(path)
            files.sync_directory(temporary)
            name = f"{sequence:06d}-{_digest(data)}"
            temporary.rename(directory / name)
            files.sync_directory(directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Snapshot(name, directory / name, rows)


def _whole_manifest(cache: Path, snapshot_id: str) -> Manifest | None:
    """The manifest of a snapshot whose files are all as they were written, else None."""
    try:
        manifest = load_manifest(cache, snapshot_id)
        require_index(cache, snapshot_id, manifest)
    except CacheDamaged:
        return None
    return manifest


def require_index(cache: Path, snapshot_id: str, manifest: Manifest) -> None:
    """Read every byte of a snapshot's index. Raises CacheDamaged."""
    for name, info in (("index.arrow", manifest.index), ("prefix.arrow", manifest.prefix)):
        file = cache / "snapshots" / snapshot_id / name
        if not file.is_file() or files.digest_file(file) != info.digest:
            raise CacheDamaged(
                f"{file} is missing or its bytes are not those that were written; make a new snapshot"
            )


def _merge_keys(cache: Path, segments: Sequence[SegmentInfo]) -> tuple[pa.RecordBatch, int, int, int]:
    """Index batch over all segments, and the counts of rows, tokens and truncated captions in it."""
    high, low, segment, row, tokens, truncated = [], [], [], [], [], []
    for number, info in enumerate(segments):
        opened = Segment(cache / "segments", info.id)
        every = np.arange(opened.rows)
        one_high, one_low = halves(opened.keys())
        high.append(one_high)
        low.append(one_low)
        segment.append(np.full(opened.rows, number, np.uint32))
        row.append(every.astype(np.uint32))
        tokens.append(opened.column("tokens", every))
        truncated.append(opened.column("truncated", every))
    if not segments:
        return (
            pa.RecordBatch.from_arrays([pa.array([], f.type) for f in INDEX_SCHEMA], schema=INDEX_SCHEMA),
            0,
            0,
            0,
        )
    columns = [np.concatenate(parts) for parts in (high, low, segment, row, tokens, truncated)]
    order = np.lexsort((columns[1], columns[0]))
    columns = [column[order] for column in columns]
    first = np.ones(len(order), bool)
    first[1:] = (columns[0][1:] != columns[0][:-1]) | (columns[1][1:] != columns[1][:-1])
    *index, kept_tokens, kept_truncated = (column[first] for column in columns)
    batch = pa.RecordBatch.from_arrays([pa.array(column) for column in index], schema=INDEX_SCHEMA)
    return batch, len(batch), int(kept_tokens.sum()), int(kept_truncated.sum())


def prefix_bits(rows: int) -> int:
    """Leading bits in the table, so that about `ROWS_PER_BUCKET` keys share an entry."""
    return min(MAX_PREFIX_BITS, max(1, (rows // ROWS_PER_BUCKET).bit_length()))


def _prefix_batch(index: pa.RecordBatch, bits: int) -> pa.RecordBatch:
    buckets = index.column("key_high").to_numpy() >> np.uint64(64 - bits)
    first = np.searchsorted(buckets, np.arange(2**bits + 1, dtype=np.uint64))
    return pa.RecordBatch.from_arrays([pa.array(first.astype(np.uint64))], schema=PREFIX_SCHEMA)


def _file_info(path: Path) -> FileInfo:
    return FileInfo(size=path.stat().st_size, digest=files.digest_file(path))


def _digest(manifest: bytes) -> str:
    return hashlib.blake2b(manifest, digest_size=8).hexdigest()
