"""The writer: the one process that adds to a cache.

put       one durable LMDB transaction for all that wait, acknowledged after its commit
seal      fresh rows → a sorted, immutable Arrow segment: write, fsync, rename, fsync the directory, and
          only then is it registered: the index points at it, and the fresh rows are dropped
compact   small segments → one larger; those it replaces are retired
snapshot  seal, compact, then an immutable view over all segments
merge     segments of another cache: linked where all of their rows are new, written anew otherwise
gc        removes retired segments that no snapshot names; nothing else ever removes a sealed row
open      deletes temporary names only; a segment that a crash left unregistered is adopted when it
          proves itself, retired when others hold all of its rows, and moved to quarantine/ when it is wrong
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lift_cache import files
from lift_cache.compaction import choose, merge_bytes, merge_segments
from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig, CacheDamaged, CacheFull, CacheNotFound, LiftError, StorageFailed
from lift_cache.keys import first_of_each, keyed
from lift_cache.live import LiveTier, SegmentRows
from lift_cache.lock import WriterLock
from lift_cache.provenance import note_provenance, provenance_of
from lift_cache.recipe import Recipe
from lift_cache.segment import (
    CHECK_ROWS,
    Segment,
    SegmentInfo,
    StoredRows,
    binary_values,
    captions_path,
    check_segment,
    require_lengths,
    row_bytes,
    row_checksums,
    segment_bytes,
    segment_ids,
    segment_path,
    write_segment,
)
from lift_cache.snapshot import (
    Snapshot,
    build_snapshot,
    find_snapshot,
    load_manifest,
    remove_snapshot,
    snapshots_of,
)

log = logging.getLogger(__name__)

SEGMENT_ROWS = 65_536
GROUP_BYTES = 1 << 26
"""Vectors that one commit takes; more wait for the next one."""


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


@dataclass(frozen=True)
class Merged:
    """What a compaction made: the new segment, and the ids of those whose place it took."""

    info: SegmentInfo
    replaced: tuple[str, ...]


@dataclass(frozen=True)
class MergeResult:
    """Rows that another cache had and this one had not, rows that both had, and segments added."""

    added: int
    present: int
    segments: int


@dataclass(frozen=True)
class Removed:
    """A file that `gc` removed, and its bytes."""

    path: Path
    size: int


class _Waiting:
    """A put on its way to the disk."""

    def __init__(self, rows: StoredRows) -> None:
        self.rows = rows
        self.stored: int | None = None
        self.error: BaseException | None = None


class CacheWriter:
    """A cache, open for adding. Thread-safe; at most one per cache on a machine."""

    def __init__(
        self, path: Path, recipe: Recipe, encoding: Encoding, lock: WriterLock, segment_rows: int
    ) -> None:
        """Use `CacheWriter.open`."""
        self.path, self.recipe, self.encoding = path, recipe, encoding
        self._lock = lock
        self._segment_rows = segment_rows
        self._waiting: deque[_Waiting] = deque()
        self._put_turn = threading.RLock()
        self._segment_turn = threading.RLock()
        self._sealer = ThreadPoolExecutor(1, thread_name_prefix="seal")
        self._sealing: Future[None] | None = None
        self._published: tuple[SegmentInfo, list[int]] | None = None
        self._segments_dir = path / "segments"
        for directory in (path, self._segments_dir, path / "snapshots"):
            files.make_directory(directory)
            files.remove_temporaries(directory)
        self._live = LiveTier(path / "live", recipe.fingerprint, encoding)
        try:
            self._opened = {
                number: self._open_registered(info) for number, info in self._live.registry().items()
            }
            self._finish_registrations()
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
        try:
            self._sealer.shutdown(wait=True)
        finally:
            self._live.close()
            self._lock.release()

    # Reading

    @property
    def rows(self) -> int:
        """Distinct captions in the cache."""
        return self._live.rows()

    @property
    def sound(self) -> bool:
        """Whether a read answers at once: False after a failed write, until what the disk holds was compared."""
        return self._live.sound

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
        left = np.flatnonzero(found)
        while len(left):
            there = locations[left]
            segment, row = there["segment"], there["row"].astype(np.int64)
            done = np.zeros(len(left), bool)
            for number in _distinct(segment):
                of_this = segment == number
                if number:
                    done |= self._get_sealed(number, keys, left, row, of_this, (stored, tokens, truncated))
                    continue
                batch = there["batch"]
                for one in _distinct(batch[of_this]):
                    of_that = of_this & (batch == one)
                    done |= self._get_fresh(one, keys, left, row, of_that, (stored, tokens, truncated))
            if done.all():
                break
            # Sealed or compacted between the two looks: ask again where the rows are now.
            left = left[~done]
            before, locations[left] = locations[left], self._live.locations(keys[left])[1]
            if np.array_equal(before, locations[left]):
                raise CacheDamaged(
                    f"{self.path / 'live'} points at rows that are not there; run `lift-cache verify`"
                )
        return Hits(found, self.encoding.decode(stored), tokens, truncated)

    def _get_fresh(
        self,
        batch: int,
        keys: np.ndarray,
        left: np.ndarray,
        row: np.ndarray,
        here: np.ndarray,
        out: tuple[np.ndarray, np.ndarray, np.ndarray],
    ) -> np.ndarray | bool:
        """Rows `row[here]` of a fresh batch into `out` at `left[here]`; False where it has been sealed meanwhile."""
        rows = self._live.fresh_rows(batch, row[here])
        if rows is None:
            return False
        at = left[here]
        self._require(rows, keys[at], batch)
        for column, values in zip(out, (rows.vectors, rows.tokens, rows.truncated), strict=True):
            column[at] = values
        return here

    def _get_sealed(
        self,
        number: int,
        keys: np.ndarray,
        left: np.ndarray,
        row: np.ndarray,
        here: np.ndarray,
        out: tuple[np.ndarray, np.ndarray, np.ndarray],
    ) -> np.ndarray | bool:
        """As `_get_fresh`, of a sealed segment; False where others have taken its place."""
        segment = self._opened.get(number)
        if segment is None:
            return False
        at, where = left[here], row[here]
        if where.max() >= segment.rows:
            raise CacheDamaged(f"{self.path / 'live'} points beyond {segment.path}; run `lift-cache verify`")
        values = (
            segment.gather(keys[at], where, check=True),
            segment.column("tokens", where),
            segment.column("truncated", where),
        )
        for column, some in zip(out, values, strict=True):
            column[at] = some
        return here

    def fresh_rows(self) -> Iterator[StoredRows]:
        """Rows that are not sealed yet, batch by batch, the newest first, every byte verified.

        What is sealed meanwhile is left out: `segments`, when it is asked afterwards, has it.

        Raises:
            CacheDamaged: bytes that are not those that were acknowledged.
        """
        for number in reversed(self._live.fresh_numbers()):
            rows = self._live.read_batch(number)
            if rows is not None:
                yield rows

    def segments(self) -> list[Segment]:
        """The sealed segments that the cache consists of now, open; some captions may be in two of them."""
        return list(self._opened.values())

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
            CacheFull, StorageFailed: not acknowledged; what of it was stored is right.
            EncodingMismatch: vectors of another dimension.
        """
        require_lengths(rows.captions, rows.vectors, rows.tokens, rows.truncated)
        stored, rejected = self.encoding.encode(np.asarray(rows.vectors, np.float32))
        texts, keys, unusable = keyed(rows.captions)
        rejected |= unusable
        ready = StoredRows(
            keys,
            stored,
            np.asarray(rows.tokens, np.int32),
            np.asarray(rows.truncated, bool),
            row_checksums(keys, stored),
            pa.array(texts, pa.large_string()),
        )
        good = len(ready) - len(rejected)
        if rejected:
            ready = ready.take(np.array([i for i in range(len(ready)) if i not in rejected], np.int64))
        ready = ready.distinct()
        if not len(ready):
            return PutResult(0, 0, rejected)
        step = max(1, GROUP_BYTES // row_bytes(self.encoding))
        new = sum(self._commit(ready.slice(at, at + step)) for at in range(0, len(ready), step))
        return PutResult(new, good - new, rejected)

    def _commit(self, rows: StoredRows) -> int:
        """Commit rows with whatever else waits; returns how many were new."""
        waiting = _Waiting(rows)
        self._waiting.append(waiting)
        with self._put_turn:  # whoever comes first commits for all that wait by then
            while waiting.stored is None and waiting.error is None:
                self._commit_waiting()
        if waiting.error is not None:
            raise waiting.error
        assert waiting.stored is not None
        return waiting.stored

    def _commit_waiting(self) -> None:
        group: list[_Waiting] = []
        size = 0
        try:
            while self._waiting and (not group or size + self._waiting[0].rows.vectors.nbytes <= GROUP_BYTES):
                group.append(self._waiting.popleft())
                size += group[-1].rows.vectors.nbytes
            if len(group) == 1:
                stored = self._live.put(group[0].rows)
            else:
                together = StoredRows.concatenate([waiting.rows for waiting in group])
                first = np.sort(first_of_each(together.keys))
                stored = np.zeros(len(together), bool)
                stored[first] = self._live.put(together.take(first))
        except BaseException as error:
            interrupted = not isinstance(error, Exception)  # Ctrl-C is for one thread, not for all that wait
            for waiting in group:
                waiting.error = StorageFailed("the commit was interrupted") if interrupted else error
            if interrupted:
                raise
            return
        end = 0
        for waiting in group:
            start, end = end, end + len(waiting.rows)
            waiting.stored = int(stored[start:end].sum())
        self._fresh_count += int(stored.sum())
        if self._fresh_count >= self._segment_rows and (self._sealing is None or self._sealing.done()):
            self._sealing = self._sealer.submit(self._seal_in_background)

    def _seal_in_background(self) -> None:
        try:
            self.seal()
        except (
            Exception
        ) as error:  # whatever it was, the rows are as durable as before, and puts need no seal
            log.warning("rows stay in live/, unsealed: %s", error)

    def seal(self) -> int:
        """Move all rows that are fresh now into sealed segments; returns how many rows that was.

        Puts go on meanwhile. Raises CacheFull: the fresh rows stay where they are.
        """
        sealed = 0
        with self._segment_turn:
            self._finish_registrations()
            if self._published is not None:  # a segment that could not be registered when it was written
                info, taken = self._published
                sealed += info.rows if self._register(info, sealed=taken) else 0
                self._published = None
            numbers = self._live.fresh_numbers()
            while numbers:
                parts: list[StoredRows] = []
                taken = []
                while numbers and sum(map(len, parts)) < self._segment_rows:
                    rows = self._live.read_batch(numbers[0])
                    assert rows is not None
                    parts.append(rows)
                    taken.append(numbers.pop(0))
                count = sum(map(len, parts))
                need = segment_bytes(self.encoding, count, 0) + sum(
                    rows.captions.nbytes for rows in parts if rows.captions is not None
                )
                files.require_room(self._segments_dir, need, "sealing")
                info = write_segment(self._segments_dir, self.recipe, self.encoding, parts)
                self._published = info, taken
                self._register(info, sealed=taken)
                self._published = None
                sealed += count
        return sealed

    def compact(
        self, *, everything: bool = False, progress: Callable[[int], None] = lambda _: None
    ) -> list[Merged]:
        """Merge small segments, where there are more than a cache of this size should have.

        Puts and reads go on meanwhile. The files of the segments that were merged stay, until `gc`.

        Args:
            everything: merge all segments into as few as may be.
            progress: called with the rows that were read.

        Raises:
            CacheFull: no room for a merged copy; what was there is as it was.
            CacheDamaged: a segment cannot be read.
        """
        done = []
        with self._segment_turn:
            self._finish_registrations()
            registry = self._live.registry()
            number_of = {info.id: number for number, info in registry.items()}
            with_captions = {
                i.id for i in registry.values() if captions_path(self._segments_dir, i.id).exists()
            }
            for group in choose(list(registry.values()), with_captions, everything=everything):
                files.require_room(self._segments_dir, merge_bytes(self.encoding, group), "compacting")
                ids = [info.id for info in sorted(group, key=lambda info: number_of[info.id])]
                info = merge_segments(self._segments_dir, self.recipe, self.encoding, ids, progress=progress)
                assert info is not None
                self._register(info, replaced=[number_of[segment_id] for segment_id in ids])
                done.append(Merged(info, tuple(ids)))
        return done

    def snapshot(self, progress: Callable[[int], None] = lambda _: None) -> Snapshot:
        """Seal everything, compact, and make an immutable view of it for trainers.

        Args:
            progress: called with the rows that were merged or indexed.

        Raises:
            CacheFull, CacheDamaged.
        """
        with self._segment_turn:
            self.seal()
            try:
                self.compact(progress=progress)
            except CacheFull as error:  # a snapshot over many segments is slower to open, and as right
                log.warning("the snapshot is made without compacting: %s", error)
            segments = list(self._live.registry().values())
            return build_snapshot(
                self.path, self.recipe, self.encoding, segments, self.provenance(), progress
            )

    def remove_snapshot(self, snapshot_id: str) -> str:
        """Remove a snapshot (its id or the beginning of it); returns its id. Raises CacheNotFound."""
        with self._segment_turn:
            found = find_snapshot(self.path, snapshot_id)
            remove_snapshot(self.path, found)
            return found

    def keep_snapshots(self, newest: int) -> list[str]:
        """Remove all snapshots but the newest `newest`; returns the ids of those removed."""
        with self._segment_turn:
            have = snapshots_of(self.path)
            gone = have[: max(0, len(have) - newest)]
            for snapshot_id in gone:
                remove_snapshot(self.path, snapshot_id)
            return gone

    def gc(self, *, dry_run: bool = False) -> list[Removed]:
        """Remove segments that others have taken the place of and that no snapshot names.

        Raises:
            CacheDamaged: a snapshot cannot be read, so that it is not known what it names.
        """
        with self._segment_turn:
            named = {
                info.id
                for snapshot_id in snapshots_of(self.path)
                for info in load_manifest(self.path, snapshot_id).segments
            }
            registered = {info.id for info in self._live.registry().values()}
            retired = self._live.retired()
            ids = sorted(set(retired) - named - registered)
            paths = [
                path
                for segment_id in ids
                for path in (
                    segment_path(self._segments_dir, segment_id),
                    captions_path(self._segments_dir, segment_id),
                )
                if path.exists()
            ]
            if paths and not dry_run:
                self._require_replacements(ids, retired, registered)
            if not self._published:  # captions whose segment was never published
                paths += [
                    path
                    for path in sorted(self._segments_dir.glob("*.captions.arrow"))
                    if not path.with_name(path.name.replace(".captions", "")).exists()
                    and path.name.removesuffix(".captions.arrow") not in named
                    and self._has_all_of(path)
                ]
            removed = [Removed(path, path.stat().st_size) for path in paths]
            if not dry_run:
                for path in paths:
                    path.unlink()  # one that a power loss brings back is retired again at the next opening
                self._live.forget_retired(ids)
            return removed

    def _has_all_of(self, captions: Path) -> bool:
        """Whether every key of a captions file is in the cache: else it is the list of what was lost."""
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(captions), "r"))
            keys = [
                binary_values(reader.get_batch(i).column("key")) for i in range(reader.num_record_batches)
            ]
        except (OSError, ValueError, KeyError, pa.ArrowException):
            return False
        return all(self.contains(some).all() for some in keys)

    def _require_replacements(
        self, ids: Sequence[str], retired: dict[str, list[str]], registered: set[str]
    ) -> None:
        """Read the segments that took the place of others whole, before the others go. Raises CacheDamaged."""
        needed: set[str] = set()
        asked, look = set(), list(ids)
        while look:
            others = retired.get(segment_id := look.pop())
            if others is None:  # of what took its place nothing is left but what that was merged into
                needed = set(registered)
                break
            asked.add(segment_id)
            needed.update(other for other in others if other in registered)
            look += [other for other in others if other not in registered and other not in asked]
        for segment_id in sorted(needed):
            path = segment_path(self._segments_dir, segment_id)
            sibling = captions_path(self._segments_dir, segment_id)
            whole = path.exists() and files.digest_file(path) == segment_id
            if whole and sibling.exists():
                captions = Segment(self._segments_dir, segment_id).captions_digest
                whole = files.digest_file(sibling) == captions
            if not whole:
                raise CacheDamaged(
                    f"{path} is damaged, and what would be removed may be the only copy of its rows; "
                    "run `lift-cache repair` first: nothing was removed"
                )

    def merge(
        self, source: str | os.PathLike[str], progress: Callable[[int], None] = lambda _: None
    ) -> MergeResult:
        """Add what another cache, or a directory of segments, has; a caption that is here keeps its vector.

        Args:
            progress: called with the rows that were read.

        Raises:
            CacheNotFound: no segments there.
            RecipeMismatch, EncodingMismatch: they were made otherwise; nothing was added.
            CacheDamaged: a segment does not prove itself; nothing was added.
            BadConfig: the source is this cache, or has rows that are not sealed.
            CacheFull, CacheLocked.
        """
        with self._segment_turn, open_source(Path(source), self.path) as (directory, ids, origin):
            segments = [self._require_ours(check_segment(directory, segment_id)) for segment_id in ids]
            here = self._segments_dir.stat().st_dev
            written = [one for one in segments if one.path.stat().st_dev != here or self._present(one)]
            need = sum(segment_bytes(self.encoding, segment.rows) for segment in written)
            files.require_room(self._segments_dir, need, "a merge")
            present = sum(self._present(segment) for segment in segments)
            before = self.rows
            added = sum(self._merge_one(segment, progress) for segment in segments)
            for entry in origin:
                self.note_provenance(entry)
            return MergeResult(self.rows - before, present, added)

    def provenance(self) -> list[dict[str, Any]]:
        """What has written to this cache, in the order of first use."""
        return provenance_of(self.path)

    def note_provenance(self, entry: dict[str, Any]) -> None:
        """Remember an engine that adds vectors (name, versions); it is named in every later snapshot."""
        note_provenance(self.path, entry)

    # Within

    def _require(self, rows: StoredRows, keys: np.ndarray, batch: int) -> None:
        right = np.array_equal(rows.keys, keys) and np.array_equal(
            row_checksums(rows.keys, rows.vectors), rows.checksums
        )
        if not right:
            raise CacheDamaged(
                f"{self.path / 'live'}: batch {batch} fails its checksums; run `lift-cache verify`"
            )

    def _register(
        self, info: SegmentInfo, *, sealed: Sequence[int] = (), replaced: Sequence[int] = ()
    ) -> bool:
        """Make a sealed segment part of the cache; False where it is already."""
        if info.id in {known.id for known in self._live.registry().values()}:
            return False  # a failed write may have reached the disk all the same
        segment = Segment(self._segments_dir, info.id)

        def announce(number: int) -> None:
            # Before the index points at it: a get that follows the index must find it. It stays in the table
            # when the transaction fails, since that may have reached the disk all the same.
            self._opened[number] = segment

        self._live.register(info, _rows_of(segment), announce, sealed=sealed, replaced=replaced)
        for old in replaced:
            self._opened.pop(old, None)
        with self._put_turn:
            self._fresh_count = self._live.fresh_counts()[0]
        return True

    def _finish_registrations(self) -> None:
        """Take up what a crash or a failed write cut off."""
        registry = self._live.registry()
        for number in self._live.pending():
            info = registry[number]
            segment = self._opened.setdefault(number, Segment(self._segments_dir, info.id))
            self._live.resume(number, info, _rows_of(segment))
        current = self._live.registry()
        for number in set(registry) - set(current):
            self._opened.pop(number, None)

    def _open_registered(self, info: SegmentInfo) -> Segment:
        path = segment_path(self._segments_dir, info.id)
        if not path.is_file() or path.stat().st_size != info.size:
            raise CacheDamaged(
                f"{path} is missing or not {info.size} bytes, but the cache counts on its {info.rows} rows; "
                "restore it from a copy, or move live/ away to go on without it"
            )
        return Segment(self._segments_dir, info.id)

    def _adopt_unregistered(self) -> None:
        leave = {segment.id for segment in self._opened.values()} | set(self._live.retired())
        named = self._named()
        for segment_id in in_order(self._segments_dir, self.path):
            if segment_id in leave:
                continue
            try:
                segment = self._proved(segment_id)
            except LiftError as error:
                if segment_id in named:
                    log.warning(
                        "segment %s, which a snapshot names, is left for `repair`: %s", segment_id, error
                    )
                else:
                    self._quarantine(segment_id, str(error))
                continue
            try:
                if not self._adopt(segment):
                    continue
            except CacheFull:
                if self._present(segment) < segment.rows:
                    raise
                # A full disk must not keep what is here from being read; the next opening adopts it.
                log.warning("segment %s is not adopted: the disk is full; its rows are in live/", segment_id)
                continue
            log.info("adopted segment %s: %d rows", segment_id, segment.rows)

    def _proved(self, segment_id: str) -> Segment:
        """A segment of this cache every byte of which is right; captions that are wrong are put aside.

        Raises:
            CacheDamaged, RecipeMismatch, EncodingMismatch, UnsupportedFormat.
        """
        try:
            return self._require_ours(check_segment(self._segments_dir, segment_id))
        except CacheDamaged as error:
            segment = self._require_ours(check_segment(self._segments_dir, segment_id, captions=False))
            self._put_aside([captions_path(self._segments_dir, segment_id)])
            log.warning("the captions of segment %s moved to quarantine: %s", segment_id, error)
            return segment

    def _adopt(self, segment: Segment) -> bool:
        """Register a segment, or those of its rows whose captions are not here; whether there were any."""
        if others := self._sealed_elsewhere(segment):
            self._live.retire(segment.id, others)
            return False
        disagreeing = self._disagreeing(segment)
        if not disagreeing:
            # A seal that was cut off before it was registered: the batches it was made of are done with.
            self._register(segment.info(), sealed=self._live.whole_batches(_key_chunks(segment)))
            return True
        # Another engine's vectors, pulled or copied here; a snapshot may name the file, so it stays.
        log.warning(
            "segment %s has other vectors for %d captions than were acknowledged; those that are here stay",
            segment.id,
            disagreeing,
        )
        info = self._new_rows(segment)
        if info is not None:
            self._register(info)
        self._live.retire(segment.id, self._sealed_elsewhere(segment))
        return info is not None

    def _merge_one(self, segment: Segment, progress: Callable[[int], None]) -> bool:
        """Register a segment of another cache, or those of its rows that are new; whether there were any."""
        while (present := self._present(segment)) < segment.rows:
            if present:
                info = self._new_rows(segment, progress)
                if info is None:
                    break
            else:
                self._take_in(segment)
                info = segment.info()
            ours = Segment(self._segments_dir, info.id)
            with self._put_turn:  # a put between this look and the registration would have two vectors
                if not self._present(ours):
                    self._register(info)
                    return True
            segment = ours
        return False

    def _new_rows(
        self, segment: Segment, progress: Callable[[int], None] = lambda _: None
    ) -> SegmentInfo | None:
        """A segment of the rows of another whose captions are not here; None where all are."""
        return merge_segments(
            self._segments_dir,
            self.recipe,
            self.encoding,
            [segment.id],
            wanted=lambda keys: ~self.contains(keys),
            progress=progress,
            source=segment.directory,
        )

    def _require_ours(self, segment: Segment) -> Segment:
        """Raises RecipeMismatch, EncodingMismatch."""
        self.recipe.require_same(segment.recipe, here=f"cache {self.path}", there=str(segment.path))
        self.encoding.require_same(segment.encoding, here=f"cache {self.path}", there=str(segment.path))
        return segment

    def _present(self, segment: Segment) -> int:
        """Rows of a segment whose captions are in the cache."""
        return sum(int(self.contains(keys).sum()) for keys in _key_chunks(segment))

    def _sealed_elsewhere(self, segment: Segment) -> list[str]:
        """Ids of registered segments that hold every caption of it together; none where they do not."""
        others: set[int] = set()
        for keys in _key_chunks(segment):
            found, locations = self._live.locations(keys)
            if not (found & (locations["segment"] != 0)).all():
                return []
            others.update(np.unique(locations["segment"]).tolist())
        registry = self._live.registry()
        return sorted(registry[number].id for number in others)

    def _disagreeing(self, segment: Segment) -> int:
        """Captions for which a segment has another vector than the cache answers."""
        wrong = 0
        for start in range(0, segment.rows, CHECK_ROWS):
            rows = segment.slice(start, min(start + CHECK_ROWS, segment.rows), captions=False)
            hits = self.get(rows.keys)
            wrong += int((hits.found & (hits.vectors != self.encoding.decode(rows.vectors)).any(1)).sum())
        return wrong

    def _take_in(self, segment: Segment) -> None:
        """Give a segment of another directory a name here; captions first."""
        if segment.directory == self._segments_dir:
            return
        if segment.has_captions:
            files.link_or_copy(
                captions_path(segment.directory, segment.id), captions_path(self._segments_dir, segment.id)
            )
        files.link_or_copy(segment.path, segment_path(self._segments_dir, segment.id))

    def _named(self) -> set[str]:
        """Ids of all segments that a snapshot names, as far as snapshots can be read."""
        named: set[str] = set()
        for snapshot_id in snapshots_of(self.path):
            with contextlib.suppress(CacheDamaged):
                named.update(info.id for info in load_manifest(self.path, snapshot_id).segments)
        return named

    def _quarantine(self, segment_id: str, reason: str) -> None:
        self._put_aside(
            [segment_path(self._segments_dir, segment_id), captions_path(self._segments_dir, segment_id)]
        )
        log.warning("segment %s moved to quarantine: %s", segment_id, reason)

    def _put_aside(self, paths: Sequence[Path]) -> None:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                files.put_aside(self.path, path)


def _distinct(numbers: np.ndarray) -> list[int]:
    """The values in a column; mostly it is one, and sorting to find that out is what a single hit would wait for."""
    if len(numbers) and (numbers == numbers[0]).all():
        return [int(numbers[0])]
    return np.unique(numbers).tolist()


def _is_cache(path: Path) -> bool:
    """Whether there is a cache. Raises BadConfig where none may be created either."""
    if (path / "recipe.json").is_file():
        return True
    files.refuse_other_content(path)
    return False


def _rows_of(segment: Segment) -> Callable[[int, int], SegmentRows]:
    def rows_at(start: int, stop: int) -> SegmentRows:
        rows = np.arange(start, stop)
        return SegmentRows(
            segment.key_slice(start, stop),
            segment.column("tokens", rows),
            segment.column("truncated", rows),
        )

    return rows_at


def _key_chunks(segment: Segment) -> Iterator[np.ndarray]:
    for start in range(0, segment.rows, CHECK_ROWS):
        yield segment.key_slice(start, min(start + CHECK_ROWS, segment.rows))


def in_order(directory: Path, cache: Path) -> list[str]:
    """Ids of a directory's segments, those first whose vector counts where two hold the same caption.

    As the newest snapshot has them; then large ones, to which those that they were merged from add nothing.
    """
    newest = snapshots_of(cache)[-1:]
    try:
        first = [info.id for name in newest for info in load_manifest(cache, name).segments]
    except CacheDamaged:
        first = []
    there = segment_ids(directory)
    rest = sorted(set(there) - set(first), key=lambda name: -segment_path(directory, name).stat().st_size)
    return [segment_id for segment_id in first if segment_id in set(there)] + rest


@contextlib.contextmanager
def open_source(source: Path, cache: Path) -> Iterator[tuple[Path, list[str], list[dict[str, Any]]]]:
    """What is to be merged: its directory of segments, their ids, and what made them; a cache is locked meanwhile.

    Raises:
        CacheNotFound, BadConfig, CacheLocked, CacheDamaged.
    """
    if not source.is_dir():
        raise CacheNotFound(f"{source} is not a directory; name a cache, or a directory of segments")
    if source.resolve() in (cache.resolve(), (cache / "segments").resolve()):
        raise BadConfig(f"{source} is the cache itself; name another to merge into it")
    directory = source / "segments" if (source / "segments").is_dir() else source
    if not segment_ids(directory):
        raise CacheNotFound(f"{source} has no segments; a cache that was filled has, after `lift-cache seal`")
    origin = provenance_of(source)
    if not (source / "live").is_dir():
        yield directory, in_order(directory, source), origin
        return
    lock = WriterLock(source)
    try:
        recipe, encoding = Recipe.load(source / "recipe.json"), Encoding.load(source / "encoding.json")
        live = LiveTier(source / "live", recipe.fingerprint, encoding, readonly=True)
        try:
            fresh = live.fresh_counts()[0]
            ids = [info.id for info in live.registry().values()]
        finally:
            live.close()
        if fresh:
            raise BadConfig(
                f"{source} has {fresh} rows that are not sealed; run `lift-cache seal {source}` first"
            )
        yield directory, ids, origin
    finally:
        lock.release()
