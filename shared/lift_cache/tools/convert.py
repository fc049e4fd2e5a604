"""Store a cache's vectors in another encoding: a new cache, and what that did to the vectors.

The new cache is built beside its final name and renamed when it is whole. A convert that is cut off leaves
nothing; one that is killed leaves a directory under a temporary name, which the next one clears away.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from cyclopts import Parameter

from lift_cache import __version__, files
from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig, CacheDamaged, VectorRejected
from lift_cache.lock import WriterLock
from lift_cache.reader import CacheReader
from lift_cache.segment import (
    SegmentInfo,
    SegmentWriter,
    StoredRows,
    captions_path,
    row_bytes,
    row_checksums,
)
from lift_cache.snapshot import build_snapshot
from lift_cache.tools.common import AsJson, Location, progress, say
from lift_cache.tools.overlap import LEAST_OVERLAP, VIEWS, Agreement, Views, agreement, fit_views

SAMPLE = 4_096
"""Captions whose neighbours are compared, all of them when there are no more; spread over the whole snapshot."""

FITTED_PER_DIMENSION = 10
"""Captions to which the views are fitted, for each dimension: what lets k reach the dimensions."""

BATCH = 4_096
ROW_BYTES = 96
"""What a row takes beside its vector and its caption: key, checksum and counts (29), and making its index."""

DType = Literal["float32", "float16", "int8"]
FINEST_FIRST = ("float32", "float16", "int8")


@dataclass(frozen=True)
class Conversion:
    """What was converted, or would be; sizes in bytes.

    size: of the new cache's files; an estimate when nothing was written.
    """

    snapshot: str
    target: Path
    rows: int
    before: Encoding
    after: Encoding
    size: int
    free: int
    captions: bool
    agreement: Agreement
    written: bool

    @property
    def note(self) -> str | None:
        """What finer storage cannot do."""
        if FINEST_FIRST.index(self.after.dtype) < FINEST_FIRST.index(self.before.dtype):
            return f"{self.after.dtype} wins nothing back that {self.before.dtype} had rounded away"
        return None

    @property
    def warning(self) -> str | None:
        """Which views are poor, and what to do."""
        if not self.agreement.poor:
            return None
        said = ", ".join(f"{view} {getattr(self.agreement, view):.3f}" for view in self.agreement.poor)
        finer = FINEST_FIRST[max(0, FINEST_FIRST.index(self.after.dtype) - 1)]
        cut = self.after.dimensions < self.before.dimensions
        advice = "keep more dimensions" if cut else f"use {finer}"
        return f"recall@10 overlap below {LEAST_OVERLAP}: {said}; {advice}, unless a training run shows it harmless"

    def to_json(self) -> dict[str, Any]:
        return {
            "snapshot": self.snapshot,
            "target": str(self.target),
            "rows": self.rows,
            "before": self.before.card() | {"bytes_per_vector": row_bytes(self.before)},
            "after": self.after.card() | {"bytes_per_vector": row_bytes(self.after)},
            "size": self.size,
            "free": self.free,
            "captions": self.captions,
            "written": self.written,
            "agreement": asdict(self.agreement) | {"poor": self.agreement.poor},
            "note": self.note,
            "warning": self.warning,
        }

    def to_text(self) -> str:
        found = self.agreement
        overlaps = [
            f"{view} {value:.3f}" if (value := getattr(found, view)) is not None else f"{view} –"
            for view in VIEWS
        ]
        directions = " and ".join(map(str, dict.fromkeys(found.k)))
        lines = [
            f"{self.snapshot}: {self.rows:,} captions, {_said(self.before)} → {_said(self.after)}",
            f"bytes per vector {row_bytes(self.before):,} → {row_bytes(self.after):,}; all files "
            f"{'' if self.written else 'about '}{self.size / 1e6:,.1f} MB ({self.free / 1e6:,.0f} MB were free)",
            f"maximum error {found.max_error:.2g}, mean cosine {found.mean_cosine:.6f}; recall@10 overlap "
            f"{', '.join(overlaps)} (k = {directions}); {found.rows:,} captions compared",
        ]
        lines += [self.note] if self.note else []
        lines += [] if self.captions else ["the source was copied without captions, so this one has none"]
        return "\n".join(lines)


def convert_cache(
    source: str,
    target: Path,
    *,
    dtype: DType | None = None,
    dimensions: int | None = None,
    dry_run: bool = False,
) -> Conversion:
    """Write a snapshot's rows, in bounded memory, as a new cache with the same recipe.

    Args:
        source: PATH or PATH@SNAPSHOT.
        target: directory of the new cache; there is nothing at that name yet.
        dtype: the source's by default.
        dimensions: how many are kept, from the front; all by default.
        dry_run: only say what it would take and what it would do to the vectors.

    Raises:
        BadConfig: the target, or an encoding that the source has already or cannot give.
        VectorRejected: a vector that the new encoding cannot hold; nothing was written.
        CacheFull: not room enough; nothing was written.
        CacheLocked: another convert is at work on this target.
        CacheNotFound, CacheDamaged, UnsupportedFormat: the source.
    """
    reader = CacheReader(source)
    _require_free_name(reader, target)
    dtype, kept = _settle(reader, dtype, dimensions)
    captions = any(
        captions_path(reader.path / "segments", info.id).exists() for info in reader.manifest.segments
    )
    around = next(parent for parent in target.absolute().parents if parent.is_dir())
    size = _estimate(reader, kept * np.dtype(dtype).itemsize, captions)
    free = files.free_bytes(around)
    files.require_room(around, size, "the converted cache")
    after = _encoding(reader, dtype, kept)
    if dry_run:
        found = _compare(reader, after, None)
    else:
        files.make_directory(target.absolute().parent)
        size, found = _build(reader, after, target, captions)
    return Conversion(
        f"{reader.path}@{reader.snapshot_id}",
        target,
        reader.rows,
        reader.encoding,
        after,
        size,
        free,
        captions,
        found,
        not dry_run,
    )


def _require_free_name(reader: CacheReader, target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise BadConfig(f"{target} exists already; name a new directory for the converted cache")
    if reader.path.resolve() in target.resolve().parents:
        raise BadConfig(f"{target} is inside the cache that is read; name a directory outside of it")


def _settle(reader: CacheReader, dtype: DType | None, dimensions: int | None) -> tuple[DType, int]:
    """The dtype and the dimensions that are wanted. Raises BadConfig."""
    have = reader.encoding
    kept = have.dimensions if dimensions is None else dimensions
    if not 0 < kept <= have.dimensions:
        raise BadConfig(
            f"--dimensions {kept}: {reader.path} has {have.dimensions}; keep 1 to {have.dimensions}"
        )
    dtype = dtype or have.dtype
    if (dtype, kept) == (have.dtype, have.dimensions):
        raise BadConfig(
            f"{reader.path} is {_said(have)} already; choose another --dtype or fewer --dimensions"
        )
    if not reader.rows:
        raise BadConfig(
            f"snapshot {reader.snapshot_id} of {reader.path} has no captions; there is nothing to convert"
        )
    return dtype, kept


def _encoding(reader: CacheReader, dtype: DType, dimensions: int) -> Encoding:
    """The new encoding; for int8 every vector is read, so that its range holds each of them."""
    if dtype != "int8":
        return Encoding(dtype=dtype, dimensions=dimensions)
    if reader.encoding.dtype == "int8":
        return reader.encoding.cut(dimensions)
    low, high = np.full(dimensions, np.inf, np.float32), np.full(dimensions, -np.inf, np.float32)
    with progress(reader.rows, "reading the range of each dimension") as done:
        for rows in reader.iter_rows(BATCH):
            vectors = rows.vectors[:, :dimensions]
            np.minimum(low, vectors.min(0, initial=np.inf), out=low)
            np.maximum(high, vectors.max(0, initial=-np.inf), out=high)
            done(len(rows))
    return Encoding.int8_of_range(low, high)


def _estimate(reader: CacheReader, vector_bytes: int, captions: bool) -> int:
    """Bytes that the new cache takes."""
    infos = reader.manifest.segments
    per_caption = -(-sum(info.captions_size for info in infos) // sum(info.rows for info in infos))
    return reader.rows * (vector_bytes + ROW_BYTES + (per_caption if captions else 0))


def _build(reader: CacheReader, encoding: Encoding, target: Path, captions: bool) -> tuple[int, Agreement]:
    """Write the new cache; its size and how it agrees with the old one."""
    # Always one name for one target, under a lock: what a killed convert left is found by the next.
    half = target.absolute().with_name(f"{files.TEMPORARY}{target.name}")
    files.make_directory(half)
    lock = WriterLock(half)
    try:
        _require_free_name(reader, target)
        for left in half.iterdir():
            if left.name != "writer.lock":
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        with files.room_for(half.parent):
            _write(reader, encoding, half, captions)
        found = _compare(reader, encoding, CacheReader(half))
        size = sum(path.stat().st_size for path in half.rglob("*") if path.is_file())
        half.rename(target)
        files.sync_directory(half.parent)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    finally:
        lock.release()
    return size, found


def _write(reader: CacheReader, encoding: Encoding, path: Path, captions: bool) -> None:
    note = {
        "converted_by": f"lift-cache {__version__}",
        "converted_from": f"{reader.snapshot_id}, {reader.encoding.dtype}, {reader.dimensions} dimensions",
    }
    provenance = [*reader.manifest.provenance, note]
    encoding.save(path / "encoding.json")
    reader.recipe.save(path / "recipe.json")
    files.write_atomic(path / "provenance.json", (json.dumps(provenance, indent=2) + "\n").encode())
    canaries = _canaries(reader)
    if canaries is not None:
        files.write_atomic(path / "canaries.json", canaries)
    files.make_directory(path / "segments")
    infos = list(_segments(reader, encoding, path / "segments", captions))
    build_snapshot(path, reader.recipe, encoding, infos, provenance)


def _segments(
    reader: CacheReader, encoding: Encoding, directory: Path, captions: bool
) -> Iterator[SegmentInfo]:
    """Write the rows in the order in which they are stored: where their keys start over, so does a segment."""
    rows = _converted(reader, encoding, captions)
    waiting = next(rows, None)
    while waiting is not None:
        with SegmentWriter(directory, reader.recipe, encoding, captions=captions) as writer:
            last = b""
            while waiting is not None and waiting.keys[0].tobytes() > last:
                writer.add(waiting)
                last = waiting.keys[-1].tobytes()
                waiting = next(rows, None)
            yield writer.finish()


def _converted(reader: CacheReader, encoding: Encoding, captions: bool) -> Iterator[StoredRows]:
    with progress(reader.rows, "writing") as done:
        for rows in reader.iter_rows(BATCH, captions=captions):
            if not len(rows):  # captions that another segment holds too
                continue
            vectors, bad = encoding.encode(reader.encoding.decode(rows.vectors))
            if bad:
                row, reason = next(iter(bad.items()))
                which = (
                    rows.captions[row].as_py()
                    if rows.captions is not None
                    else rows.keys[row].tobytes().hex()
                )
                raise VectorRejected(
                    f"{which!r}: {reason}; nothing was written, choose another --dtype or more --dimensions"
                )
            checksums = row_checksums(rows.keys, vectors)
            yield StoredRows(rows.keys, vectors, rows.tokens, rows.truncated, checksums, rows.captions)
            done(len(rows))


def _canaries(reader: CacheReader) -> bytes | None:
    """The source's canaries: vectors straight from the engine, so no encoding changes them, but a recipe does.

    Raises:
        CacheDamaged: they cannot be read.
    """
    path = reader.path / "canaries.json"
    try:
        data = path.read_bytes()
        right = json.loads(data)["fingerprint"] == reader.recipe.fingerprint
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise CacheDamaged(f"{path} is not readable; restore it from a copy of the cache") from None
    return data if right else None


def _compare(reader: CacheReader, encoding: Encoding, converted: CacheReader | None) -> Agreement:
    """How a sample agrees with its converted self: read back, or only encoded where nothing was written."""
    kept = encoding.dimensions
    rows = _spread(reader.rows, SAMPLE)
    fitted = _spread(reader.rows, FITTED_PER_DIMENSION * reader.dimensions)
    before = np.concatenate(list(_vectors(reader, rows)))
    resolution = reader.encoding.resolution(float(np.linalg.norm(before, axis=1).mean()))
    fits = 1 if kept == reader.dimensions else 2
    with progress(fits * len(fitted) + len(VIEWS) * len(rows), "comparing neighbours") as done:

        def fit(dimensions: int) -> Views:
            def blocks() -> Iterator[np.ndarray]:
                for block in _vectors(reader, fitted):
                    yield block[:, :dimensions]
                    done(len(block))

            return fit_views(blocks(), resolution)

        views = fit(reader.dimensions)
        kept_views = views if fits == 1 else fit(kept)
        if converted is None:
            after = encoding.decode(encoding.encode(before)[0])
        else:
            found = np.concatenate([converted.lookup(reader.keys(part)) for part in _parts(rows)])
            after = np.concatenate(list(_vectors(converted, found)))
        return agreement(before, after, views, kept_views, done)


def _spread(rows: int, most: int) -> np.ndarray:
    """At most so many rows, evenly spaced; keys are digests, so this is a random sample."""
    return np.linspace(0, rows - 1, min(rows, most)).astype(np.int64)


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    yield from (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


def _vectors(reader: CacheReader, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Verified vectors of rows, float32 [≤ BATCH, d] at a time."""
    return (reader.encoding.decode(reader.gather(part, check=True)) for part in _parts(rows))


def _said(encoding: Encoding) -> str:
    return f"{encoding.dimensions:,} × {encoding.dtype}"


def convert(
    cache: Location,
    target: Annotated[Path, Parameter(help="Directory of the new cache; there must be nothing there yet.")],
    *,
    dtype: Annotated[DType | None, Parameter(help="How each value is stored; as it is, unless said.")] = None,
    dimensions: Annotated[
        int | None,
        Parameter(help="How many are kept, from the front: for Matryoshka models. All, unless said."),
    ] = None,
    dry_run: Annotated[
        bool, Parameter(negative="", help="Write nothing; say what it takes and what it does to the vectors.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Store a cache's vectors in another encoding, as a new cache, and say what that did to them.

    Examples: `lift-cache convert cache cache-int8 --dtype int8`,
    `lift-cache convert cache cache-512 --dimensions 512 --dry-run`.

    Reports the maximum error, the mean cosine and the recall@10 overlap: of a caption's ten nearest captions,
    the share that still are, raw, centred and whitened; below 0.95 there is a warning. The source is not
    changed. Rows that are in no snapshot are not converted: `lift-cache snapshot` first.
    """
    done = convert_cache(cache, target, dtype=dtype, dimensions=dimensions, dry_run=dry_run)
    say(as_json, done.to_json(), done.to_text())
    if done.warning:
        print(f"warning: {done.warning}", file=sys.stderr)
