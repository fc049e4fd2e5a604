"""The live tier: one LMDB environment, private to the one writer.

    fresh      batch number → the rows of one committed group of puts: a checksum and one Arrow message
    batches    batch number → rows, tokens, truncated (so that counts need no decoding)
    index      caption key → where its row is: a fresh batch or a sealed segment
    segments   segment number → SegmentInfo
    counts     segment number → rows, tokens, truncated that the index finds there
    pending    segment number → what is left to do of a registration that takes several transactions
    retired    segments that others have taken the place of, and which: files that `gc` may remove
    meta       which cache this belongs to

Everything here but the fresh rows can be rebuilt from the sealed segments.

After a transaction that failed while it was written, nothing is known of what the disk holds: the environment
is closed, opened again and compared with what was acknowledged before the next one begins.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import secrets
import shutil
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import lmdb
import numpy as np
from pydantic import BaseModel

from lift_cache import files
from lift_cache.encoding import Encoding
from lift_cache.errors import CacheDamaged, CacheFull, LiftError, StorageFailed, UnsupportedFormat
from lift_cache.fresh import FreshGroups
from lift_cache.keys import KEY_BYTES
from lift_cache.segment import SegmentInfo, StoredRows
from lift_cache.witness import Witness, lost, witness_of

log = logging.getLogger(__name__)

LIVE_VERSION = 2
MAP_BYTES = 1 << 40
"""Address space reserved once and for all; the file itself grows only with what is written."""

CHUNK_ROWS = 8_192
"""Rows of a segment that one transaction puts into the index."""

NEARLY_FULL = 1 << 20
"""Free bytes below which a failed write is taken for a full disk."""

# Segment number (0: a fresh batch), row, batch number.
LOCATION = struct.Struct(">IIQ")
LOCATION_DTYPE = np.dtype([("segment", ">u4"), ("row", ">u4"), ("batch", ">u8")])
_NUMBER = struct.Struct(">Q")
_COUNTS = struct.Struct(">QQQ")


@contextlib.contextmanager
def lmdb_errors(path: Path) -> Iterator[None]:
    """Turn LMDB's errors into ours."""
    try:
        with files.room_for(path):
            yield
    except (lmdb.DiskError, lmdb.MapFullError) as error:
        raise files.no_room(path) from error
    except (
        lmdb.CorruptedError,
        lmdb.InvalidError,
        lmdb.PageNotFoundError,
        lmdb.NotFoundError,
        lmdb.VersionMismatchError,
    ) as error:
        raise CacheDamaged(
            f"{path} is damaged ({error}); move that directory away to rebuild it from the sealed segments "
            "(rows that were not sealed yet are embedded again)"
        ) from error
    except lmdb.Error as error:
        # A write that the disk takes only in part reaches us as an I/O error, not as a full disk.
        if "Input/output error" in str(error) and files.free_bytes(path) < NEARLY_FULL:
            raise files.no_room(path) from error
        raise StorageFailed(
            f"{path}: {error}; nothing of this write was acknowledged. Look at the disk (`dmesg`), then try again"
        ) from error


@contextlib.contextmanager
def _records(path: Path) -> Iterator[None]:
    """A record that cannot be taken apart (not text, not JSON, of another size) is damage, whichever it is."""
    try:
        yield
    except (ValueError, struct.error) as error:
        raise CacheDamaged(
            f"{path} has a record that cannot be read ({' '.join(str(error).split())}); run `lift-cache repair`"
        ) from error


@dataclass(frozen=True)
class SegmentRows:
    """keys uint8 [n, 16] · tokens int32 [n] · truncated bool [n]."""

    keys: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray


class _Pending(BaseModel):
    """A registration under way.

    Attributes:
        done: rows of the segment that are in the index.
        counts: rows, tokens, truncated of these that the index finds there.
        replaced: segment numbers whose place it takes.
        sealed: fresh batches whose rows it holds.
    """

    done: int = 0
    counts: tuple[int, int, int] = (0, 0, 0)
    replaced: tuple[int, ...] = ()
    sealed: tuple[int, ...] = ()


class LiveTier:
    """LMDB transactions in the words of the cache. Thread-safe."""

    def __init__(self, path: Path, fingerprint: str, encoding: Encoding, *, readonly: bool = False) -> None:
        """Open or create; `readonly` only opens, for a caller that holds the writer's lock all the same.

        Raises:
            CacheDamaged, CacheFull, UnsupportedFormat.
        """
        self.path = path
        self._fingerprint, self._encoding, self._readonly = fingerprint, encoding, readonly
        self._groups = FreshGroups(path, encoding)
        self._write_turn = threading.Lock()
        self._gate = threading.Condition()
        self._readers = 0
        self._suspect = self._closed = self._unsynced = False
        self._checker: int | None = None
        self._leaving: tuple[set[int], set[int]] = (set(), set())
        if not (path / "data.mdb").exists():
            if said := lost(path.parent):
                raise CacheDamaged(said)
            if not readonly:
                self._create()
        self._open(path)
        # What was acknowledged, to compare with after a failure: fresh batches, and segments.
        self._acknowledged = set(self.fresh_numbers())
        self._registered = {number: info.id for number, info in self.registry().items()}
        if not readonly:
            try:
                self._enter()
            except BaseException:
                self._env.close()
                raise

    def _create(self) -> None:
        """Make the environment under another name: LMDB writes its first pages without a sync, and a power loss
        before the first commit would leave a file that it cannot open."""
        temporary = files.temporary_name(self.path)
        with files.room_for(self.path.parent):
            try:
                files.make_directory(temporary)
                self._open(temporary)
                self._env.close()
                files.sync_directory(temporary)  # the file itself was synced by the commits in `_open`
                files.share_with_group(temporary)
                if self.path.is_dir():  # emptied by hand
                    (self.path / "lock.mdb").unlink(missing_ok=True)
                temporary.rename(self.path)
                files.sync_directory(self.path.parent)  # before live.json says that it is here
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def _open(self, path: Path) -> None:
        readonly = self._readonly
        with lmdb_errors(path):
            self._env = lmdb.open(
                os.fspath(path),
                map_size=MAP_BYTES,
                max_dbs=8,
                mode=0o666,
                readahead=False,
                readonly=readonly,
                lock=not readonly,
            )
            try:
                self._require_whole(path)
                self._meta = self._env.open_db(b"meta", create=not readonly)
                self._claim()
                self._fresh, self._batches, self._index, self._segments, self._counts = (
                    self._env.open_db(name, create=not readonly)
                    for name in (b"fresh", b"batches", b"index", b"segments", b"counts")
                )
                self._pending, self._retired = (
                    self._env.open_db(name, create=not readonly) for name in (b"pending", b"retired")
                )
            except BaseException:
                self._env.close()
                raise

    def _enter(self) -> None:
        """Begin a generation. Raises CacheDamaged: this is not the tier that was closed last."""
        if said := self.lost():
            raise CacheDamaged(said)
        try:
            with self._write() as txn:
                tier, generation = self._identity(txn)
                tier = tier or secrets.token_hex(8)
                txn.put(b"tier", tier.encode(), db=self._meta)
                txn.put(b"generation", _NUMBER.pack(generation + 1), db=self._meta)
            self._bear_witness(tier, generation + 1, None)
        except CacheFull as error:  # which must not keep what is here from being read
            log.warning("%s: the opening is not noted in live.json: %s", self.path, error)

    def _identity(self, txn: lmdb.Transaction[bytes]) -> tuple[str | None, int]:
        tier = txn.get(b"tier", db=self._meta)
        return None if tier is None else tier.decode(), self._meta_number(txn, b"generation")

    def _bear_witness(self, tier: str, generation: int, fresh: int | None) -> None:
        cache = self.path.parent
        inode = cache.stat().st_ino
        Witness(directory=inode, tier=tier, generation=generation, fresh=fresh).save(cache)

    def lost(self) -> str | None:
        """What is lost when this is not the tier that a writer closed last; None when it is."""
        witness = witness_of(self.path.parent)
        if witness is None:
            return None
        with self._read() as txn:
            said = witness.missing(*self._identity(txn))
        return said and f"{self.path} {said}"

    def _require_whole(self, path: Path) -> None:
        """A page that lies beyond the end of the file would end the process that reads it."""
        pages, size = self._env.info()["last_pgno"] + 1, (path / "data.mdb").stat().st_size
        if size < pages * self._env.stat()["psize"]:
            raise CacheDamaged(
                f"{path / 'data.mdb'} is cut short ({size:,} bytes); `lift-cache repair` rebuilds it from the "
                "sealed segments"
            )

    def _claim(self) -> None:
        ours = {
            "version": LIVE_VERSION,
            "fingerprint": self._fingerprint,
            "encoding": self._encoding.digest,
        }
        with self._env.begin(write=not self._readonly) as txn:
            found = txn.get(b"cache", db=self._meta)
            if found is None and not self._readonly:
                txn.put(b"cache", json.dumps(ours).encode(), db=self._meta)
                return
            try:
                known = json.loads(found or b"{}")
                version = int(known.get("version", LIVE_VERSION))
            except (ValueError, AttributeError, TypeError):
                raise CacheDamaged(f"{self.path} cannot be read; run `lift-cache repair`") from None
        if version != LIVE_VERSION:
            newer = version > LIVE_VERSION
            raise UnsupportedFormat(
                f"{self.path} has version {version}; this software reads {LIVE_VERSION}: "
                + ("update it, or " if newer else "")
                + "run `lift-cache seal` with the version that wrote it, then move that directory away"
            )
        if known != ours:
            raise CacheDamaged(
                f"{self.path} belongs to another cache; put its own back, or move it away to rebuild it"
            )

    def close(self) -> None:
        """Wait for what is under way, then close. Closing twice does nothing."""
        if not (self._readonly or self._closed or self._suspect):
            with contextlib.suppress(LiftError, OSError):  # without it, the next opening is told less
                fresh = self.fresh_counts()[0]
                with self._read() as txn:
                    tier, generation = self._identity(txn)
                self._bear_witness(tier or "", generation, fresh)
        with self._write_turn, self._gate:
            self._closed = True
            self._gate.wait_for(lambda: not self._readers)
            self._env.close()

    @property
    def sound(self) -> bool:
        """Whether a read begins at once; otherwise it waits until the environment was opened again and compared."""
        return not self._suspect

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Keep the environment open; never inside another, since reopening waits for all to end."""
        if self._suspect and self._checker != threading.get_ident():  # LMDB may refuse to read as well
            with self._write_turn:
                self._require_sound()
        with self._gate:
            if self._closed:
                raise StorageFailed(f"{self.path} is closed")
            self._readers += 1
        try:
            with lmdb_errors(self.path):
                yield
        finally:
            with self._gate:
                self._readers -= 1
                self._gate.notify_all()

    @contextlib.contextmanager
    def _read(self) -> Iterator[lmdb.Transaction[bytes]]:
        """A read transaction."""
        with self._reading(), self._env.begin() as txn, _records(self.path):
            yield txn

    @contextlib.contextmanager
    def _fresh_value(self, batch: int) -> Iterator[memoryview | None]:
        """The bytes of a batch where they lie in the map."""
        with self._reading(), self._env.begin(buffers=True) as txn:
            yield txn.get(_NUMBER.pack(batch), db=self._fresh)

    @contextlib.contextmanager
    def _write(self) -> Iterator[lmdb.Transaction[bytes]]:
        """A durable transaction; the next one after a failure begins with a check of what the disk holds."""
        with self._write_turn:
            self._require_sound()
            if self._unsynced:
                # What failed may be in the file, unsynced, and newer than what LMDB has gone back to. It must not
                # come out of a power loss after this transaction has written over its pages.
                with lmdb_errors(self.path):
                    self._env.sync(True)
                self._unsynced = False
            self._leaving = (set(), set())
            try:
                with lmdb_errors(self.path), self._env.begin(write=True) as txn, _records(self.path):
                    yield txn
            except BaseException:
                self._suspect = True
                raise

    def _require_sound(self) -> None:
        """In the write turn: reopen after a failure. Raises CacheDamaged, StorageFailed."""
        if self._closed:
            raise StorageFailed(f"{self.path} is closed")
        if self._suspect:
            self._checker = threading.get_ident()
            try:
                self._reopen()
            finally:
                self._checker = None

    def _reopen(self) -> None:
        """Raises CacheDamaged: something that was acknowledged is not there any more."""
        with self._gate:
            self._gate.wait_for(lambda: not self._readers)
            self._env.close()
            self._groups.forget()
            with contextlib.suppress(OSError):
                _forget_pages(self.path / "data.mdb")
            self._open(self.path)
            self._unsynced = True
        # A failed commit may have reached the disk all the same: what it dropped is gone then.
        dropped_batches, dropped_segments = self._leaving
        missing = set(self._registered) - set(self.registry()) - dropped_segments
        if missing:
            raise CacheDamaged(
                f"{self.path} has lost {len(missing)} sealed segments after a failed write; restart the writer"
            )
        for number in self._acknowledged:
            if self.read_batch(number) is None and number not in dropped_batches:
                raise CacheDamaged(
                    f"{self.path} has lost batch {number} after a failed write; run `lift-cache verify`"
                )
        # What it wrote is there, and stays.
        self._acknowledged = set(self.fresh_numbers())
        self._registered = {number: info.id for number, info in self.registry().items()}
        self._suspect = False
        log.warning("%s was reopened after a failed write; all that was acknowledged is there", self.path)

    # Reading

    def locations(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where keys (uint8 [n, 16]) are: found bool [n], and locations (LOCATION_DTYPE [n])."""
        with self._read() as txn:
            return self._locations(txn, keys)

    def _locations(self, txn: lmdb.Transaction[bytes], keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        locations = np.zeros(len(keys), LOCATION_DTYPE)
        data = keys.tobytes()
        names = [data[at : at + KEY_BYTES] for at in range(0, len(data), KEY_BYTES)]
        with txn.cursor(db=self._index) as cursor:
            there = dict(cursor.getmulti(names))
        found = np.fromiter((name in there for name in names), bool, len(names))
        values = b"".join(there[name] for name in names if name in there)
        if len(values) != LOCATION.size * int(found.sum()):
            raise CacheDamaged(f"{self.path} has an index that cannot be read; run `lift-cache verify`")
        locations[found] = np.frombuffer(values, LOCATION_DTYPE)
        return found, locations

    def fresh_rows(self, batch: int, rows: np.ndarray) -> StoredRows | None:
        """Rows (int64 [n]) of one committed batch without their captions, copied out of the map.

        Returns None when the batch has been sealed in the meantime.
        """
        with self._fresh_value(batch) as value:
            return None if value is None else self._groups.take(value, batch, rows)

    def read_batch(self, batch: int, *, verified: bool = True) -> StoredRows | None:
        """A whole committed batch, captions and all; None as in `fresh_rows`.

        Args:
            verified: every byte; without it only what Arrow checks, for a caller that proves each row itself.

        Raises:
            CacheDamaged.
        """
        with self._fresh_value(batch) as value:
            if value is None:
                return None
            whole = self._groups.verified(value, batch) if verified else self._groups.decode(value, batch)
            return whole.take(np.arange(len(whole)))

    def fresh_numbers(self) -> list[int]:
        with self._read() as txn, txn.cursor(db=self._batches) as cursor:
            return [_NUMBER.unpack(name)[0] for name in cursor.iternext(keys=True, values=False)]

    def batch_rows(self, batch: int) -> int:
        """Rows of a fresh batch, as they were counted when it was committed; 0 where it is not known."""
        with self._read() as txn:
            value = txn.get(_NUMBER.pack(batch), db=self._batches)
            return _COUNTS.unpack(value)[0] if value and len(value) == _COUNTS.size else 0

    def fresh_counts(self) -> tuple[int, int, int]:
        """Rows, tokens and truncated captions that are not sealed yet."""
        return self._sum(self._batches)

    def whole_batches(self, chunks: Iterable[np.ndarray]) -> list[int]:
        """Fresh batches all of whose rows are among some keys (uint8 [n, 16] each, distinct)."""
        rows: Counter[int] = Counter()
        for keys in chunks:
            found, locations = self.locations(keys)
            rows.update(locations["batch"][found & (locations["segment"] == 0)].tolist())
        with self._read() as txn:
            counts = {batch: txn.get(_NUMBER.pack(batch), db=self._batches) for batch in rows}
        return [b for b, value in counts.items() if value and _COUNTS.unpack(value)[0] == rows[b]]

    def fresh_bytes(self) -> int:
        """Bytes of the rows that are not sealed yet."""
        total = 0
        for number in self.fresh_numbers():
            with self._fresh_value(number) as value:
                total += len(value or b"")
        return total

    def sealed_counts(self) -> tuple[int, int, int]:
        """Rows, tokens and truncated captions that are sealed; a caption in two segments counts once."""
        return self._sum(self._counts)

    def _sum(self, db: lmdb._Database) -> tuple[int, int, int]:
        rows = tokens = truncated = 0
        with self._read() as txn, txn.cursor(db=db) as cursor:
            for value in cursor.iternext(keys=False, values=True):
                more = _COUNTS.unpack(value)
                rows, tokens, truncated = rows + more[0], tokens + more[1], truncated + more[2]
        return rows, tokens, truncated

    def rows(self) -> int:
        """Distinct captions."""
        with self._read() as txn:
            return int(txn.stat(self._index)["entries"])

    def registry(self) -> dict[int, SegmentInfo]:
        """Segment number → segment, in the order of registration."""
        with self._read() as txn, txn.cursor(db=self._segments) as cursor:
            return {_NUMBER.unpack(name)[0]: SegmentInfo.model_validate_json(value) for name, value in cursor}

    def pending(self) -> list[int]:
        """Segments whose registration is not finished."""
        with self._read() as txn, txn.cursor(db=self._pending) as cursor:
            return [_NUMBER.unpack(name)[0] for name in cursor.iternext(keys=True, values=False)]

    def retired(self) -> dict[str, list[str]]:
        """Segments that others have taken the place of, and the ids of those."""
        with self._read() as txn, txn.cursor(db=self._retired) as cursor:
            return {name.decode(): json.loads(value) for name, value in cursor}

    def index_items(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The whole index, ascending, some at a time: keys uint8 [n, 16], locations (LOCATION_DTYPE [n])."""
        after = b""
        while True:
            with self._read() as txn, txn.cursor(db=self._index) as cursor:
                there = cursor.set_range(after) if after else cursor.first()
                items = list(itertools.islice(cursor.iternext(), CHUNK_ROWS)) if there else []
            if not items:
                return
            names = [after[:-1], *(key for key, _ in items)]
            if any(a >= b for a, b in itertools.pairwise(names)):  # damaged pages can lead round in a circle
                raise CacheDamaged(f"{self.path} has an index that is not in order; run `lift-cache repair`")
            if {len(key) for key, _ in items} != {KEY_BYTES} or {len(v) for _, v in items} != {LOCATION.size}:
                raise CacheDamaged(f"{self.path} has an index that cannot be read; run `lift-cache repair`")
            keys = np.frombuffer(b"".join(key for key, _ in items), np.uint8).reshape(-1, KEY_BYTES)
            yield keys, np.frombuffer(b"".join(value for _, value in items), LOCATION_DTYPE)
            after = items[-1][0] + b"\0"

    # Writing: each is one durable transaction, but `register`, which is taken up again where it was cut off

    def put(self, rows: StoredRows) -> np.ndarray:
        """Commit rows of distinct keys as one batch; those that are in the index already are left out.

        Returns:
            Which were stored: bool [n].
        """
        if self.locations(rows.keys)[0].all():
            return np.zeros(len(rows), bool)
        with self._write() as txn:
            new = ~self._locations(txn, rows.keys)[0]
            if not new.any():
                return new
            rows = rows if new.all() else rows.take(np.flatnonzero(new))
            number = 1 + max(self._last(txn, self._batches), self._meta_number(txn, b"last-batch"))
            name = _NUMBER.pack(number)
            txn.put(name, self._groups.encode(rows), db=self._fresh, append=True)
            counts = _COUNTS.pack(len(rows), int(rows.tokens.sum(dtype=np.int64)), int(rows.truncated.sum()))
            txn.put(name, counts, db=self._batches, append=True)
            txn.put(b"last-batch", name, db=self._meta)
            items = [(key.tobytes(), LOCATION.pack(0, row, number)) for row, key in enumerate(rows.keys)]
            with txn.cursor(db=self._index) as cursor:
                cursor.putmulti(items)
        self._acknowledged.add(number)
        return new

    def register(
        self,
        info: SegmentInfo,
        rows_at: Callable[[int, int], SegmentRows],
        announce: Callable[[int], None],
        *,
        sealed: Sequence[int] = (),
        replaced: Sequence[int] = (),
    ) -> None:
        """Make a sealed segment part of the cache; a key that another segment has stays with that one.

        Args:
            rows_at: rows start … stop of the segment.
            announce: told the segment's number before anything points at it.
            sealed: fresh batches whose rows it holds; they are dropped.
            replaced: segments all of whose rows it holds; they are retired.
        """
        with self._write() as txn:
            number = 1 + max(self._last(txn, self._segments), self._meta_number(txn, b"last-segment"))
            announce(number)
            name = _NUMBER.pack(number)
            txn.put(name, info.model_dump_json().encode(), db=self._segments, append=True)
            txn.put(b"last-segment", name, db=self._meta)
            pending = _Pending(replaced=tuple(replaced), sealed=tuple(sealed))
            finished = self._advance(txn, number, info, pending, rows_at)
        self._registered[number] = info.id
        if finished:
            self._finished(pending)
        else:
            self.resume(number, info, rows_at)

    def resume(self, number: int, info: SegmentInfo, rows_at: Callable[[int, int], SegmentRows]) -> None:
        """Finish a registration, a transaction for every `CHUNK_ROWS` rows, so that puts find their turn."""
        finished = False
        while not finished:
            with self._write() as txn:
                value = txn.get(_NUMBER.pack(number), db=self._pending)
                pending = _Pending.model_validate_json(value or b"")
                finished = self._advance(txn, number, info, pending, rows_at)
        self._finished(pending)

    def _finished(self, pending: _Pending) -> None:
        self._acknowledged.difference_update(pending.sealed)
        for old in pending.replaced:
            self._registered.pop(old, None)

    def _advance(
        self,
        txn: lmdb.Transaction[bytes],
        number: int,
        info: SegmentInfo,
        pending: _Pending,
        rows_at: Callable[[int, int], SegmentRows],
    ) -> bool:
        """Point the index at the next rows; after the last, drop what they take the place of."""
        stop = min(pending.done + CHUNK_ROWS, info.rows)
        rows = rows_at(pending.done, stop)
        found, locations = self._locations(txn, rows.keys)
        # A row that is fresh, and not of the batches that this segment was sealed from, was acknowledged with
        # another vector perhaps; a row of another segment likewise.
        fresh = locations["segment"] == 0
        taken_over = np.where(
            fresh,
            np.isin(locations["batch"], pending.sealed),
            np.isin(locations["segment"], (*pending.replaced, number)),
        )
        mine = np.flatnonzero(~found | taken_over)
        items = [(rows.keys[i].tobytes(), LOCATION.pack(number, pending.done + i, 0)) for i in mine.tolist()]
        with txn.cursor(db=self._index) as cursor:
            cursor.putmulti(items)
        more = (len(mine), int(rows.tokens[mine].sum(dtype=np.int64)), int(rows.truncated[mine].sum()))
        counts = (
            pending.counts[0] + more[0],
            pending.counts[1] + more[1],
            pending.counts[2] + more[2],
        )
        name = _NUMBER.pack(number)
        if stop < info.rows:
            left = pending.model_copy(update={"done": stop, "counts": counts})
            txn.put(name, left.model_dump_json().encode(), db=self._pending)
            return False
        self._leaving = (set(pending.sealed), set(pending.replaced))
        txn.delete(name, db=self._pending)
        txn.put(name, _COUNTS.pack(*counts), db=self._counts)
        for batch in pending.sealed:
            txn.delete(_NUMBER.pack(batch), db=self._fresh)
            txn.delete(_NUMBER.pack(batch), db=self._batches)
        for old in pending.replaced:
            gone = txn.get(_NUMBER.pack(old), db=self._segments)
            if gone is not None:
                name = SegmentInfo.model_validate_json(gone).id.encode()
                txn.put(name, json.dumps([info.id]).encode(), db=self._retired)
            txn.delete(_NUMBER.pack(old), db=self._segments)
            txn.delete(_NUMBER.pack(old), db=self._counts)
        txn.delete(info.id.encode(), db=self._retired)
        return True

    def retire(self, segment_id: str, others: Sequence[str]) -> None:
        """Remember a segment that is not registered because these others hold all of its rows."""
        with self._write() as txn:
            txn.put(segment_id.encode(), json.dumps(list(others)).encode(), db=self._retired)

    def forget_retired(self, ids: Sequence[str]) -> None:
        """Their files are gone."""
        with self._write() as txn:
            for segment_id in ids:
                txn.delete(segment_id.encode(), db=self._retired)

    def _last(self, txn: lmdb.Transaction[bytes], db: lmdb._Database) -> int:
        with txn.cursor(db=db) as cursor:
            return int(_NUMBER.unpack(cursor.key())[0]) if cursor.last() else 0

    def _meta_number(self, txn: lmdb.Transaction[bytes], name: bytes) -> int:
        # Numbers are never used twice: who looked up a batch or segment that was replaced meanwhile must find
        # nothing under its number, not another one.
        value = txn.get(name, db=self._meta)
        return 0 if value is None else int(_NUMBER.unpack(value)[0])


def _forget_pages(path: Path) -> None:
    """Have the next read of a file come from the disk, not from pages that may never have got there."""
    if hasattr(os, "posix_fadvise"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
