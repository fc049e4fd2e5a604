"""How the live tier stores a committed group of puts: a checksum, then one Arrow message with the rows.

A group never changes under its number, so where its columns lie is found out once, and rows are read from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from lift_cache.encoding import Encoding
from lift_cache.errors import CacheDamaged
from lift_cache.keys import KEY_BYTES
from lift_cache.segment import (
    CAPTIONS_SCHEMA,
    StoredRows,
    binary_values,
    flag_values,
    list_values,
    number_values,
    vector_schema,
)

CHECKSUM_BYTES = 8

REMEMBERED = 8_192
"""Groups whose columns are known; far more than are fresh at a time."""


class _Places(NamedTuple):
    """Bytes of a value, its rows, and the bytes from its start to each column."""

    size: int
    rows: int
    keys: int
    vectors: int
    tokens: int
    truncated: int
    checksums: int


class FreshGroups:
    """Values of the live tier to rows and back. Thread-safe."""

    def __init__(self, path: Path, encoding: Encoding) -> None:
        """`path` is the live tier's, for what errors say."""
        self._path, self._encoding = path, encoding
        self._schema = pa.schema([*vector_schema(encoding), CAPTIONS_SCHEMA.field("caption")])
        self._known: dict[int, _Places] = {}

    def encode(self, rows: StoredRows) -> bytes:
        assert rows.captions is not None
        vectors = rows.vector_batch(vector_schema(self._encoding))
        batch = pa.RecordBatch.from_arrays([*vectors.columns, rows.captions], schema=self._schema)
        message = memoryview(batch.serialize())
        return b"".join((xxhash.xxh3_64_digest(message), message))

    def decode(self, value: memoryview, number: int) -> StoredRows:
        """All rows; they still point into the value. Raises CacheDamaged."""
        batch = self._batch(value, number)
        return StoredRows(
            binary_values(batch.column(0)),
            list_values(batch.column(1), self._encoding.dimensions),
            number_values(batch.column(2)),
            flag_values(batch.column(3), np.arange(len(batch))),
            number_values(batch.column(4)),
            batch.column(5),
        )

    def verified(self, value: memoryview, number: int) -> StoredRows:
        """As `decode`, every byte compared with the checksum. Raises CacheDamaged."""
        if xxhash.xxh3_64_digest(value[CHECKSUM_BYTES:]) != bytes(value[:CHECKSUM_BYTES]):
            raise CacheDamaged(f"{self._path}: batch {number} fails its checksum; run `lift-cache verify`")
        return self.decode(value, number)

    def take(self, value: memoryview, number: int, rows: np.ndarray) -> StoredRows:
        """Some rows (int64 [n]) without their captions, copied. Raises CacheDamaged."""
        places = self._known.get(number)
        if places is None or places.size != len(value):
            places = self._places(value, number)
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[number] = places
        n, encoding = places.rows, self._encoding
        if len(rows) and rows.max() >= n:
            raise CacheDamaged(f"{self._path}: batch {number} lacks rows; run `lift-cache verify`")
        bits = np.ndarray(((n + 7) >> 3,), np.uint8, value, places.truncated)
        return StoredRows(
            np.ndarray((n, KEY_BYTES), np.uint8, value, places.keys)[rows],
            np.ndarray((n, encoding.dimensions), encoding.numpy_dtype, value, places.vectors)[rows],
            np.ndarray((n,), np.int32, value, places.tokens)[rows],
            (bits[rows >> 3] >> (rows & 7).astype(np.uint8) & 1).view(bool),
            np.ndarray((n,), np.uint64, value, places.checksums)[rows],
            None,
        )

    def forget(self) -> None:
        """After the values may have become others."""
        self._known.clear()

    def _places(self, value: memoryview, number: int) -> _Places:
        start = pa.py_buffer(value).address
        columns = self._batch(value, number).columns
        if any(column.offset for column in columns):
            raise CacheDamaged(f"{self._path}: batch {number} cannot be read; run `lift-cache verify`")
        keys, vectors, tokens, truncated, checksums, _ = columns
        at = [
            column.buffers()[1].address - start
            for column in (keys, vectors.values, tokens, truncated, checksums)
        ]
        return _Places(len(value), len(keys), *at)

    def _batch(self, value: memoryview, number: int) -> pa.RecordBatch:
        try:
            batch = pa.ipc.read_record_batch(pa.py_buffer(value[CHECKSUM_BYTES:]), self._schema)
            batch.validate()
            return batch
        except (OSError, ValueError, pa.ArrowException) as error:
            raise CacheDamaged(
                f"{self._path}: batch {number} cannot be read ({error}); run `lift-cache verify`"
            ) from None
