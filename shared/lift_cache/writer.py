"""The writer: the one process that adds to a cache.

put       one durable LMDB transaction, acknowledged after its commit
seal      fresh rows → a sorted, immutable Arrow segment: write, fsync, rename, fsync the directory, and
          only then one transaction that registers it, points the index at it and drops the fresh rows
snapshot  seal, then an immutable view over all segments
open      deletes temporary names only; a segment that a crash left unregistered is adopted when it
          proves itself, and moved to quarantine/ when it does not
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lift_cache import files
from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig, CacheDamaged, CacheFull, CacheNotFound, LiftError
from lift_cache.keys import KEY_BYTES, key_of_normalised, normalise
from lift_cache.live import LiveTier, SegmentRows
from lift_cache.lock import WriterLock
from lift_cache.recipe import Recipe
from lift_cache.segment import (
    Segment,
    SegmentInfo,
    StoredRows,
    captions_path,
    check_segment,
    row_checksums,
    segment_ids,
    segment_path,
    write_segment,
)
from lift_cache.snapshot import Snapshot, build_snapshot

log = logging.getLogger(__name__)

SEGMENT_ROWS = 65_536


@dataclass(frozen=True)
class Rows:
    """Captions and what an engine made of them.

    captions: n texts · vectors float32 [n, d] · tokens int32 [n] · truncated bool [n].
    """

    captions: Sequence[str]
    vectors: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray


@dataclass(frozen=True)
class PutResult:
    """What became of a put: rows stored, rows that were there already, row → reason for those refused."""

    stored: int
    present: int
    rejected: dict[int, str]


@dataclass(frozen=True)
class Hits:
    """Answers to keys: found bool [n] · vectors float32 [n, d] as stored · tokens int32 [n] · truncated bool [n].

    Rows that were not found hold zeros.
    """

    found: np.ndarray
    vectors: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray


@dataclass(frozen=True)
class CacheStats:
    """Counts over distinct captions; `size` is in bytes on disk, sealed files only."""

    rows: int
    fresh_rows: int
    segments: int
    tokens: int
    truncated: int
    size: int


class CacheWriter:
    """A cache, open for adding. Thread-safe; at most one per cache on a machine."""

    def __init__(
        self, path: Path, recipe: Recipe, encoding: Encoding, lock: WriterLock, segment_rows: int
    ) -> None:
        """Use `CacheWriter.open`."""
        self.path, self.recipe, self.encoding = path, recipe, encoding
        self._lock = lock
        self._segment_rows = segment_rows
        self._put_turn = threading.Lock()
        self._seal_turn = threading.Lock()
        self._snapshot_turn = threading.Lock()
        self._sealer = ThreadPoolExecutor(1, thread_name_prefix="seal")
        self._sealing: Future[int] | None = None
        self._segments_dir = path / "segments"
        for directory in (path, self._segments_dir, path / "snapshots"):
            files.make_directory(directory)
            files.remove_temporaries(directory)
        self._live = LiveTier(path / "live", recipe.fingerprint, encoding)
        try:
            self._opened = {
                number: self._open_registered(info) for number, info in self._live.registry().items()
            }
            self._adopt_unregistered()
            self._fresh_count = self._live.fresh_counts()[0]
        except BaseException:
            self._live.close()
            raise

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        recipe: Recipe | None = None,
        encoding: Encoding | None = None,
        *,
        segment_rows: int = SEGMENT_ROWS,
    ) -> CacheWriter:
        """Open a cache for writing; create it when there is none and a recipe is given.

        Args:
            recipe: required to equal the cache's own; None takes the cache's.
            encoding: likewise; float16 over all dimensions for a new cache.
            segment_rows: fresh rows that start a seal in the background.

        Raises:
            CacheNotFound: no cache there, and no recipe to create one with.
            RecipeMismatch, EncodingMismatch: the cache was made otherwise.
            CacheLocked: another process writes to it.
            UnsafeFileSystem: a network file system.
            CacheDamaged, CacheFull, UnsupportedFormat, BadConfig.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise BadConfig(f"{path} is a file; a cache is a directory")
        if recipe is None and not (path / "recipe.json").is_file():
            raise CacheNotFound(f"{path} is not a cache (no recipe.json); check the path")
        _is_cache(path)
        try:
            with files.room_for(path):
                files.make_directory(path)
                files.refuse_network_file_system(path)
                lock = WriterLock(path)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise BadConfig(
                f"{error.filename or path} cannot be written ({error.strerror}); a writer needs the right to"
            ) from None
        try:
            if _is_cache(path):  # asked again: another process may have created it meanwhile
                own_recipe, own_encoding = (
                    Recipe.load(path / "recipe.json"),
                    Encoding.load(path / "encoding.json"),
                )
                if recipe is not None:
                    own_recipe.require_same(recipe, here=f"cache {path}", there="what was asked for")
                if encoding is not None:
                    own_encoding.require_same(encoding, here=f"cache {path}", there="what was asked for")
            else:
                assert recipe is not None
                own_recipe, own_encoding = recipe, encoding or Encoding(dimensions=recipe.dimensions)
                own_encoding.save(path / "encoding.json")
                own_recipe.save(path / "recipe.json")
            return cls(path, own_recipe, own_encoding, lock, segment_rows)
        except BaseException:
            lock.release()
            raise

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish a seal that is under way and release the cache. Fresh rows stay durable in `live/`."""
        self._sealer.shutdown(wait=True)
        try:
            self._raise_failed_seal()
        except Exception as error:  # whatever it was, the rows are as durable as before
            log.warning("rows stay in live/, unsealed: %s", error)
        finally:
            self._live.close()
            self._lock.release()

    # Reading

    @property
    def rows(self) -> int:
        """Distinct captions in the cache."""
        return self._live.rows()

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Which of the keys (uint8 [n, 16]) are in the cache: bool [n]."""
        return self._live.locations(keys)[0]

    def get(self, keys: np.ndarray) -> Hits:
        """Look keys (uint8 [n, 16]) up; every answered row's key and checksum are verified.

        Raises:
            CacheDamaged: a row's bytes are not those that were acknowledged.
        """
        n = len(keys)
        stored = np.zeros((n, self.encoding.dimensions), self.encoding.numpy_dtype)
        tokens, truncated = np.zeros(n, np.int32), np.zeros(n, bool)
        found, locations = self._live.locations(keys)
        pending = found.copy()
        while pending.any():
            for batch in np.unique(locations["batch"][pending & (locations["segment"] == 0)]).tolist():
                fresh = self._live.fresh_rows(batch)
                if fresh is None:
                    continue
                here = pending & (locations["segment"] == 0) & (locations["batch"] == batch)
                rows = fresh.take(locations["row"][here].astype(np.int64))
                self._require(rows, keys[here], batch)
                stored[here], tokens[here], truncated[here] = rows.vectors, rows.tokens, rows.truncated
                pending &= ~here
            for number in np.unique(locations["segment"][pending & (locations["segment"] != 0)]).tolist():
                segment = self._opened[number]
                here = pending & (locations["segment"] == number)
                where = locations["row"][here].astype(np.int64)
                stored[here] = segment.gather(keys[here], where, check=True)
                tokens[here] = segment.column("tokens", where)
                truncated[here] = segment.column("truncated", where)
                pending &= ~here
            if pending.any():
                # A batch was sealed between the two looks: ask again where its rows are now.
                locations[pending] = self._live.locations(keys[pending])[1]
        return Hits(found, self.encoding.decode(stored), tokens, truncated)

    def stats(self) -> CacheStats:
        """Counts of what is stored."""
        registry = list(self._live.registry().values())
        fresh, sealed = self._live.fresh_counts(), self._live.sealed_counts()
        return CacheStats(
            rows=self._live.rows(),
            fresh_rows=fresh[0],
            segments=len(registry),
            tokens=fresh[1] + sealed[1],
            truncated=fresh[2] + sealed[2],
            size=sum(info.size + info.captions_size for info in registry),
        )

    # Writing

    def put(self, rows: Rows) -> PutResult:
        """Store rows durably; when this returns, they survive a power loss.

        A caption that is there already keeps its vector. A row that may not be stored (an unusable caption
        or vector) is refused by position and does not hold up the others.

        Raises:
            CacheFull: no room; nothing of this call was stored.
            EncodingMismatch: vectors of another dimension.
        """
        stored, rejected = self.encoding.encode(np.asarray(rows.vectors, np.float32))
        texts: list[str] = []
        keys = np.zeros((len(rows.captions), KEY_BYTES), np.uint8)
        for i, caption in enumerate(rows.captions):
            try:
                text = normalise(caption)
            except LiftError as error:
                rejected[i] = str(error)
                text = ""
            else:
                keys[i] = np.frombuffer(key_of_normalised(text), np.uint8)
            texts.append(text)
        good = np.array([i not in rejected for i in range(len(texts))], bool)
        with self._put_turn:
            self._raise_failed_seal()
            chosen = first_of_each(keys, good & ~self.contains(keys))
            if len(chosen):
                chosen_keys, chosen_vectors = keys[chosen], stored[chosen]
                self._live.put(
                    StoredRows(
                        chosen_keys,
                        chosen_vectors,
                        np.asarray(rows.tokens, np.int32)[chosen],
                        np.asarray(rows.truncated, bool)[chosen],
                        row_checksums(chosen_keys, chosen_vectors),
                        pa.array([texts[i] for i in chosen.tolist()], pa.large_string()),
                    )
                )
                self._fresh_count += len(chosen)
                if self._fresh_count >= self._segment_rows and (
                    self._sealing is None or self._sealing.done()
                ):
                    self._sealing = self._sealer.submit(self.seal)
        return PutResult(len(chosen), int(good.sum()) - len(chosen), rejected)

    def seal(self) -> int:
        """Move all rows that are fresh now into sealed segments; returns how many rows that was.

        Puts go on meanwhile. Raises CacheFull: the fresh rows stay where they are.
        """
        sealed = 0
        with self._seal_turn:
            numbers = self._live.fresh_numbers()
            while numbers:
                parts: list[StoredRows] = []
                taken: list[int] = []
                while numbers and sum(map(len, parts)) < self._segment_rows:
                    rows = self._live.require_fresh(numbers[0])
                    assert rows is not None
                    parts.append(rows)
                    taken.append(numbers.pop(0))
                together = StoredRows.concatenate(parts)
                info = write_segment(self._segments_dir, self.recipe, self.encoding, together)
                self._register(info, taken)
                sealed += len(together)
        return sealed

    def snapshot(self) -> Snapshot:
        """Seal everything and make an immutable view of it for trainers.

        Raises:
            CacheFull, CacheDamaged.
        """
        with self._put_turn:
            self._raise_failed_seal()
        with self._snapshot_turn:
            self.seal()
            segments = list(self._live.registry().values())
            return build_snapshot(self.path, self.recipe, self.encoding, segments, self.provenance())

    def provenance(self) -> list[dict[str, Any]]:
        """What has written to this cache, in the order of first use."""
        path = self.path / "provenance.json"
        return list(json.loads(path.read_bytes())) if path.exists() else []

    def note_provenance(self, entry: dict[str, Any]) -> None:
        """Remember an engine that adds vectors (name, versions); it is named in every later snapshot."""
        known = self.provenance()
        if entry not in known:
            files.write_atomic(
                self.path / "provenance.json", (json.dumps([*known, entry], indent=2) + "\n").encode()
            )

    # Within

    def _require(self, rows: StoredRows, keys: np.ndarray, batch: int) -> None:
        right = np.array_equal(rows.keys, keys) and np.array_equal(
            row_checksums(rows.keys, rows.vectors), rows.checksums
        )
        if not right:
            raise CacheDamaged(
                f"{self.path / 'live'}: batch {batch} fails its checksums; run `lift-cache verify`"
            )

    def _register(self, info: SegmentInfo, sealed: Sequence[int]) -> None:
        segment = Segment(self._segments_dir, info.id)
        every = np.arange(segment.rows)
        rows = SegmentRows(
            segment.keys(), segment.column("tokens", every), segment.column("truncated", every)
        )
        with self._put_turn:
            # Open before the index points at it: a get that follows the index must find it.
            number = 1 + max(self._opened, default=0)
            self._opened[number] = segment
            try:
                registered = self._live.register(info, rows, sealed)
            except BaseException:
                del self._opened[number]
                raise
            assert registered == number
            self._fresh_count = self._live.fresh_counts()[0]

    def _open_registered(self, info: SegmentInfo) -> Segment:
        path = segment_path(self._segments_dir, info.id)
        if not path.is_file() or path.stat().st_size != info.size:
            raise CacheDamaged(
                f"{path} is missing or not {info.size} bytes, but the cache counts on its {info.rows} rows; "
                "restore it from a copy, or move live/ away to go on without it"
            )
        return Segment(self._segments_dir, info.id)

    def _adopt_unregistered(self) -> None:
        known = {segment.id for segment in self._opened.values()}
        adopted = False
        for segment_id in segment_ids(self._segments_dir):
            if segment_id in known:
                continue
            try:
                segment = check_segment(self._segments_dir, segment_id, need_captions=False)
                self.recipe.require_same(segment.recipe, here=f"cache {self.path}", there=segment.path.name)
                self.encoding.require_same(
                    segment.encoding, here=f"cache {self.path}", there=segment.path.name
                )
            except LiftError as error:
                self._quarantine(segment_id, str(error))
                continue
            if disagreeing := self._disagreeing(segment):
                reason = f"it holds other vectors for {disagreeing} captions than were acknowledged"
                self._quarantine(segment_id, reason)
                continue
            try:
                self._register(segment.info(), ())
            except CacheFull:
                if not self.contains(segment.keys()).all():
                    raise
                # A full disk must not keep what is here from being read; the next opening adopts it.
                log.warning("segment %s is not adopted: the disk is full; its rows are in live/", segment_id)
                continue
            adopted = True
            log.info("adopted segment %s: %d rows", segment_id, segment.rows)
        if adopted:
            self._live.drop_sealed_batches()

    def _disagreeing(self, segment: Segment) -> int:
        """Captions for which a segment has another vector than the cache answers."""
        hits = self.get(segment.keys())
        theirs = self.encoding.decode(segment.vectors(np.arange(segment.rows)))
        return int((hits.found & (hits.vectors != theirs).any(1)).sum())

    def _quarantine(self, segment_id: str, reason: str) -> None:
        where = self.path / "quarantine"
        files.make_directory(where)
        for path in (
            segment_path(self._segments_dir, segment_id),
            captions_path(self._segments_dir, segment_id),
        ):
            with contextlib.suppress(FileNotFoundError):
                path.rename(where / path.name)
        files.sync_directory(where)
        files.sync_directory(self._segments_dir)
        log.warning("segment %s moved to %s: %s", segment_id, where, reason)

    def _raise_failed_seal(self) -> None:
        """A seal that failed in the background is the next caller's error, not a line in a log."""
        if self._sealing is not None and self._sealing.done():
            done, self._sealing = self._sealing, None
            error = done.exception()
            if error is not None:
                raise error


def _is_cache(path: Path) -> bool:
    """Whether there is a cache. Raises BadConfig where none may be created either."""
    if (path / "recipe.json").is_file():
        return True
    files.refuse_other_content(path)
    return False


def first_of_each(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Positions, ascending, of the first wanted row of each distinct key."""
    first: dict[bytes, int] = {}
    for i in np.flatnonzero(wanted).tolist():
        first.setdefault(keys[i].tobytes(), i)
    return np.fromiter(first.values(), np.int64, len(first))
