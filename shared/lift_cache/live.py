"""The live tier: one LMDB environment, private to the one writer.

    fresh      batch number → the rows of one committed put, as one Arrow message
    batches    batch number → rows, tokens, truncated (so that counts need no decoding)
    index      caption key → where its row is: a fresh batch or a sealed segment
    segments   segment number → SegmentInfo; position in this table is the order of precedence
    counts     segment number → rows, tokens, truncated that no segment before it had
    meta       which cache this belongs to

Everything here but the fresh rows can be rebuilt from the sealed segments.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa

from lift_cache import files
from lift_cache.encoding import Encoding
from lift_cache.errors import CacheDamaged, UnsupportedFormat
from lift_cache.segment import (
    CAPTIONS_SCHEMA,
    SegmentInfo,
    StoredRows,
    binary_values,
    list_values,
    row_checksums,
    vector_schema,
)

LIVE_VERSION = 1
MAP_BYTES = 1 << 40
"""Address space reserved once and for all; the file itself grows only with what is written."""

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
        raise


@dataclass(frozen=True)
class SegmentRows:
    """keys uint8 [n, 16] · tokens int32 [n] · truncated bool [n]."""

    keys: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray


class LiveTier:
    """LMDB transactions in the words of the cache. Not thread-safe for writes: the writer takes turns."""

    def __init__(self, path: Path, fingerprint: str, encoding: Encoding, *, readonly: bool = False) -> None:
        """Open or create; `readonly` only opens, for a caller that holds the writer's lock all the same.

        Raises:
            CacheDamaged, CacheFull, UnsupportedFormat.
        """
        self.path = path
        self._encoding = encoding
        self._schema = pa.schema([*vector_schema(encoding), CAPTIONS_SCHEMA.field("caption")])
        if not readonly:
            files.make_directory(path)
        with lmdb_errors(path):
            self.env = lmdb.open(
                os.fspath(path),
                map_size=MAP_BYTES,
                max_dbs=8,
                mode=0o666,
                readahead=False,
                readonly=readonly,
                lock=not readonly,
            )
            try:
                self._fresh, self._batches, self._index, self._segments, self._counts, self._meta = (
                    self.env.open_db(name, create=not readonly)
                    for name in (b"fresh", b"batches", b"index", b"segments", b"counts", b"meta")
                )
                self._claim(fingerprint, readonly)
                if not readonly:
                    files.sync_directory(path)  # the data file's name must be as durable as its content
            except BaseException:
                self.env.close()
                raise

    def _claim(self, fingerprint: str, readonly: bool) -> None:
        ours = {"version": LIVE_VERSION, "fingerprint": fingerprint, "encoding": self._encoding.digest}
        with self.env.begin(write=not readonly) as txn:
            found = txn.get(b"cache", db=self._meta)
            if found is None and not readonly:
                txn.put(b"cache", json.dumps(ours).encode(), db=self._meta)
                return
            known = json.loads(bytes(found or b"null"))
        if known and known["version"] > LIVE_VERSION:
            raise UnsupportedFormat(
                f"{self.path} has version {known['version']}; this software reads {LIVE_VERSION}: "
                "update it, or run `lift-cache seal` with the version that wrote it"
            )
        if known != ours:
            raise CacheDamaged(
                f"{self.path} belongs to another cache; put its own back, or move it away to rebuild it"
            )

    def close(self) -> None:
        self.env.close()

    # Reading

    def locations(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where keys (uint8 [n, 16]) are: found bool [n], and locations (LOCATION_DTYPE [n])."""
        found = np.zeros(len(keys), bool)
        locations = np.zeros(len(keys), LOCATION_DTYPE)
        names = [key.tobytes() for key in keys]
        with self.env.begin() as txn, txn.cursor(db=self._index) as cursor:
            there = dict(cursor.getmulti(names))
        for i, name in enumerate(names):
            value = there.get(name)
            if value is not None:
                found[i] = True
                locations[i] = LOCATION.unpack(value)
        return found, locations

    def fresh_rows(self, batch: int) -> StoredRows | None:
        """One committed batch, copied out of the map; None when it has been sealed in the meantime."""
        with self.env.begin(buffers=True) as txn:
            value = txn.get(_NUMBER.pack(batch), db=self._fresh)
            return None if value is None else self._decode(bytes(value), batch)

    def require_fresh(self, batch: int) -> StoredRows | None:
        """As `fresh_rows`, every checksum verified. Raises CacheDamaged."""
        rows = self.fresh_rows(batch)
        if rows is not None and not np.array_equal(row_checksums(rows.keys, rows.vectors), rows.checksums):
            raise CacheDamaged(f"{self.path}: batch {batch} fails its checksums; run `lift-cache verify`")
        return rows

    def fresh_numbers(self) -> list[int]:
        with self.env.begin() as txn, txn.cursor(db=self._batches) as cursor:
            return [_NUMBER.unpack(name)[0] for name in cursor.iternext(keys=True, values=False)]

    def fresh_counts(self) -> tuple[int, int, int]:
        """Rows, tokens and truncated captions that are not sealed yet."""
        return self._sum(self._batches)

    def sealed_counts(self) -> tuple[int, int, int]:
        """Rows, tokens and truncated captions that are sealed; a caption in two segments counts once."""
        return self._sum(self._counts)

    def _sum(self, db: lmdb._Database) -> tuple[int, int, int]:
        rows = tokens = truncated = 0
        with self.env.begin() as txn, txn.cursor(db=db) as cursor:
            for value in cursor.iternext(keys=False, values=True):
                more = _COUNTS.unpack(value)
                rows, tokens, truncated = rows + more[0], tokens + more[1], truncated + more[2]
        return rows, tokens, truncated

    def rows(self) -> int:
        """Distinct captions."""
        with self.env.begin() as txn:
            return int(txn.stat(self._index)["entries"])

    def registry(self) -> dict[int, SegmentInfo]:
        """Segment number → segment, in the order of registration."""
        with self.env.begin() as txn, txn.cursor(db=self._segments) as cursor:
            return {_NUMBER.unpack(name)[0]: SegmentInfo.model_validate_json(value) for name, value in cursor}

    # Writing: each is one durable transaction

    def put(self, rows: StoredRows) -> int:
        """Commit rows none of which is in the index; returns the number of the batch."""
        with lmdb_errors(self.path), self.env.begin(write=True) as txn:
            number = 1 + max(self._last(txn, self._batches), self._meta_number(txn))
            name = _NUMBER.pack(number)
            txn.put(name, self._encode(rows), db=self._fresh, append=True)
            counts = _COUNTS.pack(len(rows), int(rows.tokens.sum()), int(rows.truncated.sum()))
            txn.put(name, counts, db=self._batches, append=True)
            txn.put(b"last-batch", name, db=self._meta)
            items = [(key.tobytes(), LOCATION.pack(0, row, number)) for row, key in enumerate(rows.keys)]
            with txn.cursor(db=self._index) as cursor:
                cursor.putmulti(items)
        return number

    def register(self, info: SegmentInfo, rows: SegmentRows, sealed: Sequence[int]) -> int:
        """Make a sealed segment part of the cache; a key that another segment has stays with it.

        Args:
            rows: what the segment holds, in its order.
            sealed: fresh batches whose rows it holds; they are dropped in the same transaction.
        """
        found, locations = self.locations(rows.keys)
        new = np.flatnonzero(~(found & (locations["segment"] != 0)))
        counts = (len(new), int(rows.tokens[new].sum()), int(rows.truncated[new].sum()))
        with lmdb_errors(self.path), self.env.begin(write=True) as txn:
            number = 1 + self._last(txn, self._segments)
            name = _NUMBER.pack(number)
            txn.put(name, info.model_dump_json().encode(), db=self._segments, append=True)
            txn.put(name, _COUNTS.pack(*counts), db=self._counts, append=True)
            with txn.cursor(db=self._index) as cursor:
                cursor.putmulti([(rows.keys[i].tobytes(), LOCATION.pack(number, i, 0)) for i in new.tolist()])
            for batch in sealed:
                txn.delete(_NUMBER.pack(batch), db=self._fresh)
                txn.delete(_NUMBER.pack(batch), db=self._batches)
        return number

    def drop_sealed_batches(self) -> int:
        """Drop fresh batches no row of which the index points at; returns how many."""
        dropped = 0
        for batch in self.fresh_numbers():
            rows = self.fresh_rows(batch)
            assert rows is not None
            found, locations = self.locations(rows.keys)
            if not (found & (locations["segment"] == 0) & (locations["batch"] == batch)).any():
                with lmdb_errors(self.path), self.env.begin(write=True) as txn:
                    txn.delete(_NUMBER.pack(batch), db=self._fresh)
                    txn.delete(_NUMBER.pack(batch), db=self._batches)
                dropped += 1
        return dropped

    def _last(self, txn: lmdb.Transaction, db: lmdb._Database) -> int:
        with txn.cursor(db=db) as cursor:
            return int(_NUMBER.unpack(cursor.key())[0]) if cursor.last() else 0

    def _meta_number(self, txn: lmdb.Transaction) -> int:
        # Batch numbers are never used twice: a reader that looked up a batch which was sealed meanwhile must
        # find nothing under its number, not another batch.
        value = txn.get(b"last-batch", db=self._meta)
        return 0 if value is None else int(_NUMBER.unpack(value)[0])

    def _encode(self, rows: StoredRows) -> pa.Buffer:
        assert rows.captions is not None
        vectors = rows.vector_batch(vector_schema(self._encoding))
        batch = pa.RecordBatch.from_arrays([*vectors.columns, rows.captions], schema=self._schema)
        return batch.serialize()

    def _decode(self, data: bytes, number: int) -> StoredRows:
        try:
            batch = pa.ipc.read_record_batch(pa.py_buffer(data), self._schema)
            batch.validate(full=True)
        except (OSError, pa.ArrowException) as error:
            raise CacheDamaged(
                f"{self.path}: batch {number} cannot be read ({error}); run `lift-cache verify`"
            ) from None
        return StoredRows(
            binary_values(batch.column(0)),
            list_values(batch.column(1), self._encoding.dimensions),
            batch.column(2).to_numpy(),
            batch.column(3).to_numpy(zero_copy_only=False),
            batch.column(4).to_numpy(),
            batch.column(5),
        )
