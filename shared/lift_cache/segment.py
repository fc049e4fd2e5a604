"""A sealed segment: rows sorted by key in one immutable Arrow file, with their captions in a sibling.

    <id>.arrow            key · vector · tokens · truncated · checksum     (what trainers read)
    <id>.captions.arrow   key · caption                                    (may be left out of a copy)

The id is the BLAKE2b-128 digest of the file's own bytes. The schema's metadata holds the recipe and the
encoding; a last batch without rows holds what is known only at the end: the digest of the sibling and counts.
So a segment describes and proves itself, wherever it is copied to. `docs/cache.md` has the format in full.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import BaseModel, ConfigDict

from lift_cache import files
from lift_cache.encoding import Encoding
from lift_cache.errors import BadCaption, CacheDamaged, EncodingMismatch, UnsupportedFormat
from lift_cache.flatmap import Extent, alignment
from lift_cache.keys import KEY_BYTES, caption_key, first_of_each, halves
from lift_cache.recipe import Recipe

FORMAT_VERSION = 2
BATCH_BYTES = 1 << 28
"""Bytes of vectors in one record batch: what writing or merging a segment of any size holds in memory."""

CHECK_ROWS = 8_192
"""Rows that are read at a time when a whole segment is."""

CAPTIONS_SCHEMA = pa.schema([("key", pa.binary(KEY_BYTES)), ("caption", pa.large_string())])


def vector_schema(encoding: Encoding) -> pa.Schema:
    dtype = pa.from_numpy_dtype(encoding.numpy_dtype)
    return pa.schema(
        [
            ("key", pa.binary(KEY_BYTES)),
            ("vector", pa.list_(dtype, encoding.dimensions)),
            ("tokens", pa.int32()),
            ("truncated", pa.bool_()),
            ("checksum", pa.uint64()),
        ]
    )


def row_checksums(keys: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """XXH3-64 over each row's key bytes followed by its stored vector bytes: uint64 [n].

    Args:
        keys: uint8 [n, 16].
        vectors: stored dtype [n, d].
    """
    row_bytes = vectors.shape[1] * vectors.itemsize
    raw = np.ascontiguousarray(vectors).view(np.uint8).reshape(len(keys), row_bytes)
    rows = np.concatenate([keys, raw], axis=1)
    return np.fromiter((xxhash.xxh3_64_intdigest(row) for row in rows), np.uint64, len(rows))


def require_lengths(*columns: Sized) -> None:
    """Raises EncodingMismatch: captions, vectors, tokens and flags that are not of one length."""
    if len({len(column) for column in columns}) > 1:
        raise EncodingMismatch(
            f"{', '.join(str(len(column)) for column in columns)} captions, vectors, token counts and flags; "
            "there must be one of each for every row"
        )


@dataclass(frozen=True)
class StoredRows:
    """Rows in their stored form.

    keys uint8 [n, 16] · vectors stored dtype [n, d] · tokens int32 [n] · truncated bool [n] ·
    checksums uint64 [n] · captions: n normalised strings, or None where the captions were left out.
    """

    keys: np.ndarray
    vectors: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray
    checksums: np.ndarray
    captions: pa.Array | None

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, order: np.ndarray) -> StoredRows:
        return StoredRows(
            self.keys[order],
            self.vectors[order],
            self.tokens[order],
            self.truncated[order],
            self.checksums[order],
            None if self.captions is None else self.captions.take(pa.array(order)),
        )

    @staticmethod
    def concatenate(parts: Sequence[StoredRows]) -> StoredRows:
        captions = [part.captions for part in parts]
        return StoredRows(
            np.concatenate([part.keys for part in parts]),
            np.concatenate([part.vectors for part in parts]),
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.truncated for part in parts]),
            np.concatenate([part.checksums for part in parts]),
            None if any(c is None for c in captions) else pa.concat_arrays(captions),
        )

    def distinct(self) -> StoredRows:
        """Without the later ones of equal keys."""
        first = np.sort(first_of_each(self.keys))
        return self if len(first) == len(self) else self.take(first)

    @staticmethod
    def in_order(parts: Sequence[StoredRows]) -> StoredRows:
        """Rows ascending by key, of equal keys the first; vectors, which are most of it, are copied once."""
        keys = np.concatenate([part.keys for part in parts])
        chosen = first_of_each(keys)
        place = np.full(len(keys), -1, np.int64)
        place[chosen] = np.arange(len(chosen))
        vectors = np.empty((len(chosen), *parts[0].vectors.shape[1:]), parts[0].vectors.dtype)
        end = 0
        for part in parts:
            start, end = end, end + len(part)
            to = place[start:end]
            if to.min(initial=0) < 0:
                vectors[to[to >= 0]] = part.vectors[to >= 0]
            else:
                vectors[to] = part.vectors
        captions = [part.captions for part in parts]
        return StoredRows(
            keys[chosen],
            vectors,
            np.concatenate([part.tokens for part in parts])[chosen],
            np.concatenate([part.truncated for part in parts])[chosen],
            np.concatenate([part.checksums for part in parts])[chosen],
            None if any(c is None for c in captions) else pa.concat_arrays(captions).take(pa.array(chosen)),
        )

    def slice(self, start: int, stop: int) -> StoredRows:
        """Consecutive rows, without a copy."""
        here = slice(start, stop)
        return StoredRows(
            self.keys[here],
            self.vectors[here],
            self.tokens[here],
            self.truncated[here],
            self.checksums[here],
            None if self.captions is None else self.captions[here],
        )

    def vector_batch(self, schema: pa.Schema) -> pa.RecordBatch:
        dimensions = self.vectors.shape[1]
        columns = [
            binary_array(self.keys),
            pa.FixedSizeListArray.from_arrays(pa.array(self.vectors.reshape(-1)), dimensions),
            pa.array(self.tokens, pa.int32()),
            pa.array(self.truncated, pa.bool_()),
            pa.array(self.checksums, pa.uint64()),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=schema)


def binary_array(keys: np.ndarray) -> pa.Array:
    """Keys uint8 [n, 16] as an Arrow array, without a copy."""
    return pa.Array.from_buffers(
        pa.binary(KEY_BYTES), len(keys), [None, pa.py_buffer(np.ascontiguousarray(keys))]
    )


def binary_values(array: pa.Array) -> np.ndarray:
    """An Arrow key column as uint8 [n, 16], without a copy."""
    whole = np.frombuffer(array.buffers()[1], np.uint8).reshape(-1, KEY_BYTES)
    return whole[array.offset : array.offset + len(array)]


def number_values(array: pa.Array) -> np.ndarray:
    """An Arrow column of numbers as [n], without a copy. (Its own `to_numpy` imports pandas, wherever that is.)"""
    values = np.frombuffer(array.buffers()[1], array.type.to_pandas_dtype())
    return values[array.offset : array.offset + len(array)]


def list_values(array: pa.Array, dimensions: int) -> np.ndarray:
    """An Arrow vector column as [n, d], without a copy."""
    values = number_values(array.values)
    return values[: len(values) // dimensions * dimensions].reshape(-1, dimensions)[array.offset :][
        : len(array)
    ]


def flag_values(array: pa.Array, rows: np.ndarray) -> np.ndarray:
    """The given rows (int64 [m]) of an Arrow column of bools: bool [m]."""
    bits, at = np.frombuffer(array.buffers()[1], np.uint8), rows + array.offset
    return (bits.take(at >> 3) >> (at & 7).astype(np.uint8) & 1).view(bool)


class SegmentInfo(BaseModel):
    """What the registry and a snapshot's manifest say of a segment. Sizes are in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    rows: int
    size: int
    tokens: int
    truncated: int
    captions_digest: str
    captions_size: int


def segment_path(directory: Path, segment_id: str) -> Path:
    return directory / f"{segment_id}.arrow"


def captions_path(directory: Path, segment_id: str) -> Path:
    return directory / f"{segment_id}.captions.arrow"


def row_bytes(encoding: Encoding) -> int:
    """Bytes of one stored vector."""
    return encoding.dimensions * encoding.numpy_dtype.itemsize


def segment_bytes(encoding: Encoding, rows: int, caption_bytes: int = 60) -> int:
    """Estimate of what a segment of so many rows takes on disk, its captions among it."""
    per_row = row_bytes(encoding) + 2 * KEY_BYTES + 8 + 4 + 1 + 8 + caption_bytes
    return rows * per_row + 16_384


def write_segment(
    directory: Path, recipe: Recipe, encoding: Encoding, parts: Sequence[StoredRows]
) -> SegmentInfo:
    """Write one segment durably. Rows may come in any order; of equal keys the first counts.

    Writing the same rows twice gives the same id.

    Raises:
        CacheFull: no room; nothing under a final name is left of this segment but, perhaps, its captions.
    """
    rows = StoredRows.in_order(parts)
    with SegmentWriter(directory, recipe, encoding, captions=rows.captions is not None) as writer:
        writer.add(rows)
        return writer.finish()


class SegmentWriter:
    """One segment, written row after row in bounded memory; leaves nothing behind when it is not finished."""

    def __init__(self, directory: Path, recipe: Recipe, encoding: Encoding, *, captions: bool = True) -> None:
        """Begin.

        Args:
            directory: of segments; it exists.
            captions: whether rows will have captions (and the segment a sibling).
        """
        self._directory = directory
        metadata = {
            "lift.format": str(FORMAT_VERSION),
            "lift.recipe": recipe.canonical_json(),
            "lift.fingerprint": recipe.fingerprint,
            "lift.encoding": encoding.model_dump_json(),
        }
        self._schema = vector_schema(encoding).with_metadata(metadata)
        self._row_bytes = row_bytes(encoding)
        self._batch_rows = max(1, BATCH_BYTES // self._row_bytes)
        self._waiting: list[StoredRows] = []
        self._waiting_rows = 0
        self._rows = self._tokens = self._truncated = 0
        self._vectors = _ArrowFile(files.temporary_name(directory / "segment.arrow"), self._schema)
        self._captions = None
        if captions:
            captions_tmp = files.temporary_name(directory / "captions.arrow")
            self._captions = _ArrowFile(captions_tmp, CAPTIONS_SCHEMA)

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._vectors.discard()
        if self._captions is not None:
            self._captions.discard()

    def add(self, rows: StoredRows) -> None:
        """Append rows: keys ascending and distinct, going on above those that were added before.

        Raises:
            CacheFull.
        """
        self._waiting.append(rows)
        self._waiting_rows += len(rows)
        while self._waiting_rows >= self._batch_rows:
            self._write(self._batch_rows)

    def finish(self) -> SegmentInfo:
        """Publish the segment under its digest; captions first, so that it is never without its sibling.

        Raises:
            CacheFull.
        """
        self._write(self._waiting_rows)
        assert self._rows, "a segment has rows"
        captions_digest, captions_size = "", 0
        with files.room_for(self._directory):
            if self._captions is not None:
                captions_digest, captions_size = self._captions.finish(), self._captions.size()
            trailer = {
                "lift.captions": captions_digest,
                "lift.captions-size": str(captions_size),
                "lift.rows": str(self._rows),
                "lift.tokens": str(self._tokens),
                "lift.truncated": str(self._truncated),
            }
            self._vectors.write(empty_batch(self._schema), trailer)
            info = SegmentInfo(
                id=self._vectors.finish(),
                rows=self._rows,
                size=self._vectors.size(),
                tokens=self._tokens,
                truncated=self._truncated,
                captions_digest=captions_digest,
                captions_size=captions_size,
            )
            if self._captions is not None:
                self._captions.publish(captions_path(self._directory, info.id))
            self._vectors.publish(segment_path(self._directory, info.id))
        return info

    def _write(self, count: int) -> None:
        parts: list[StoredRows] = []
        while count and self._waiting:
            part = self._waiting[0]
            if len(part) <= count:
                self._waiting.pop(0)
            else:
                self._waiting[0], part = part.slice(count, len(part)), part.slice(0, count)
            parts.append(part)
            count -= len(part)
            self._waiting_rows -= len(part)
        if not parts:
            return
        rows = parts[0] if len(parts) == 1 else StoredRows.concatenate(parts)
        self._rows += len(rows)
        self._tokens += int(rows.tokens.sum(dtype=np.int64))
        self._truncated += int(rows.truncated.sum())
        with files.room_for(self._directory):
            self._vectors.write(
                rows.vector_batch(self._schema),
                align=alignment(self._row_bytes),
                aligned_at=len(rows) * KEY_BYTES,
            )
            if self._captions is not None:
                keys = binary_array(rows.keys)
                self._captions.write(
                    pa.RecordBatch.from_arrays([keys, rows.captions], schema=CAPTIONS_SCHEMA)
                )


class _ArrowFile:
    """An Arrow IPC file under a temporary name."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self._schema = path, schema
        with files.room_for(path.parent):
            self._sink = pa.OSFile(str(path), "wb")
            self._writer = pa.ipc.new_file(self._sink, schema)
        self._open = True

    def write(
        self,
        batch: pa.RecordBatch,
        metadata: dict[str, str] | None = None,
        *,
        align: int = 8,
        aligned_at: int = 0,
    ) -> None:
        """Append a batch.

        Args:
            align, aligned_at: the byte `aligned_at` of the batch's body comes to lie on a multiple of `align`
                bytes in the file. Arrow itself promises 8; the rest is padded inside the batch's metadata.
        """
        if align > 8:
            before, head = _framing(self._schema, {"lift.pad": ""})
            # Arrow writes the schema only with the first batch.
            body = (self._sink.tell() or before) + head
            metadata = {"lift.pad": " " * (-(body + aligned_at) % align)}
        self._writer.write_batch(batch, custom_metadata=metadata)

    def close(self) -> None:
        if self._open:
            self._open = False
            try:
                self._writer.close()
            finally:
                self._sink.close()

    def finish(self) -> str:
        """Close it, make it durable, and read it back meanwhile for its digest, which is returned."""
        self.close()
        with ThreadPoolExecutor(1) as reading:
            digest = reading.submit(files.digest_file, self.path)
            files.sync_file(self.path)
            return digest.result()

    def size(self) -> int:
        return self.path.stat().st_size

    def publish(self, final: Path) -> None:
        files.rename(self.path, final)

    def discard(self) -> None:
        """Close and delete what was not published."""
        with contextlib.suppress(OSError, pa.ArrowException):
            self.close()
        self.path.unlink(missing_ok=True)


def empty_batch(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


def _framing(schema: pa.Schema, metadata: dict[str, str]) -> tuple[int, int]:
    """Bytes of a file before its first batch, and of a batch before its body (the same for any rows, if any)."""
    one = pa.RecordBatch.from_arrays([pa.nulls(1, field.type) for field in schema], schema=schema)
    body = pa.ipc.read_message(one.serialize()).body.size
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(one, custom_metadata=metadata)
        first = sink.tell()
        writer.write_batch(one, custom_metadata=metadata)
        head = sink.tell() - first - body
    return first - head - body, head


class _Texts:
    """A column of captions, read without trust: Arrow would follow damaged offsets anywhere."""

    def __init__(self, column: pa.Array) -> None:
        """Raises ValueError, IndexError, TypeError: not such a column."""
        _, offsets, data = column.buffers()
        if column.type != pa.large_string() or column.offset or offsets.size < 8 * (len(column) + 1):
            raise ValueError("not a column of captions")
        self._offsets = np.frombuffer(offsets, np.int64, len(column) + 1)
        self._data = memoryview(data or b"")

    def text(self, row: int) -> str:
        """Raises ValueError, IndexError."""
        start, stop = int(self._offsets[row]), int(self._offsets[row + 1])
        if not 0 <= start <= stop <= len(self._data):
            raise ValueError(f"row {row} has no such bytes")
        return bytes(self._data[start:stop]).decode()


class Segment:
    """A sealed segment, memory-mapped.

    Attributes:
        rows: number of rows.
        fingerprint, encoding: as the file states them.
    """

    def __init__(self, directory: Path, segment_id: str) -> None:
        """Raises CacheDamaged (missing, not readable) and UnsupportedFormat (newer format)."""
        self.id = segment_id
        self.directory = directory
        self.path = segment_path(directory, segment_id)
        try:
            source = pa.memory_map(str(self.path), "r")
            reader = pa.ipc.open_file(source)
            metadata = _decoded(reader.schema.metadata)
            version = int(metadata["lift.format"])
            if version > FORMAT_VERSION:
                raise UnsupportedFormat(
                    f"{self.path} has format version {version}; this software reads {FORMAT_VERSION}: update it"
                )
            self._recipe_json = metadata["lift.recipe"]
            self.fingerprint = metadata["lift.fingerprint"]
            self.encoding = Encoding.model_validate_json(metadata["lift.encoding"])
            if not reader.schema.equals(vector_schema(self.encoding)):
                raise CacheDamaged(f"{self.path} has other columns than a segment; run `lift-cache verify`")
            batches = reader.num_record_batches
            if version == 1:
                self.captions_digest = metadata["lift.captions"]
            else:
                batches -= 1
                trailer = _decoded(reader.get_batch_with_custom_metadata(batches).custom_metadata)
                self.captions_digest = trailer["lift.captions"]
            self._batches = [reader.get_batch(i) for i in range(batches)]
            for batch in self._batches:
                batch.validate()  # buffers are as long as the rows need
            self._base = source.read_buffer().address
            dimensions = self.encoding.dimensions
            self._keys = [binary_values(batch.column(0)) for batch in self._batches]
            self._vectors = [list_values(batch.column(1), dimensions) for batch in self._batches]
            if not self._batches or any(
                not len(k) == len(v) == len(b)
                for k, v, b in zip(self._keys, self._vectors, self._batches, strict=True)
            ):
                raise ValueError("columns of different lengths")
        except FileNotFoundError:
            raise CacheDamaged(f"{self.path} is missing; restore it from a copy of the cache") from None
        except (
            OSError,
            pa.ArrowException,
            KeyError,
            ValueError,
            TypeError,
            IndexError,
            NotImplementedError,
        ) as error:
            raise CacheDamaged(
                f"{self.path} cannot be read ({_first_line(error)}); run `lift-cache verify`"
            ) from None
        self._columns: dict[str, list[np.ndarray]] = {}
        self._siblings: list[_Texts] | None = None
        self.rows = sum(len(batch) for batch in self._batches)
        # Every batch but the last is of one length, so a row's batch is a division.
        self.batch_rows = max(1, len(self._batches[0]) if self._batches else 1)

    @cached_property
    def recipe(self) -> Recipe:
        """As the file states it. Raises CacheDamaged."""
        return Recipe.parse(self._recipe_json, where=str(self.path))

    def key_extents(self) -> list[Extent]:
        """Where the keys lie in the file, batch by batch."""
        return self._extents(self._keys)

    def vector_extents(self) -> list[Extent]:
        """Where the stored vectors lie in the file, batch by batch."""
        return self._extents(self._vectors)

    def _extents(self, columns: list[np.ndarray]) -> list[Extent]:
        return [Extent(self.path, column.ctypes.data - self._base, len(column)) for column in columns]

    def _gather(self, columns: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
        if len(columns) == 1:
            return columns[0].take(rows, axis=0)
        out = np.empty((len(rows), *columns[0].shape[1:]), columns[0].dtype)
        batch_of = rows // self.batch_rows
        for b in np.unique(batch_of).tolist():
            here = batch_of == b
            out[here] = columns[b][rows[here] - b * self.batch_rows]
        return out

    def key_high(self, row: int) -> int:
        """The first 64 bits of a row's key."""
        key = self._keys[row // self.batch_rows][row % self.batch_rows]
        return int.from_bytes(key[:8].tobytes(), "big")

    def first_from(self, high: int) -> int:
        """The first row whose key begins with at least these 64 bits."""
        return bisect.bisect_left(range(self.rows), high, key=self.key_high)

    def keys(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Keys of the given rows (all of them by default): uint8 [n, 16]."""
        if rows is None:
            return np.concatenate(self._keys) if len(self._keys) != 1 else self._keys[0]
        return self._gather(self._keys, rows)

    def key_slice(self, start: int, stop: int) -> np.ndarray:
        """Keys of consecutive rows: uint8 [n, 16]."""
        return self._slice(self._keys, start, stop)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Stored vectors of the given rows, copied: [n, d]."""
        return self._gather(self._vectors, rows)

    def slice(self, start: int, stop: int, *, captions: bool) -> StoredRows:
        """Consecutive rows, every checksum verified.

        Raises:
            CacheDamaged: bytes that are not those that were written, or captions that are not here.
        """
        keys, vectors = self.key_slice(start, stop), self._slice(self._vectors, start, stop)
        return self._stored(np.arange(start, stop), keys, vectors, captions)

    def take(self, rows: np.ndarray, *, captions: bool) -> StoredRows:
        """As `slice`, for any rows (int64 [n])."""
        return self._stored(rows, self.keys(rows), self.vectors(rows), captions)

    def _stored(self, rows: np.ndarray, keys: np.ndarray, vectors: np.ndarray, captions: bool) -> StoredRows:
        checksums = self.column("checksum", rows)
        self._require(keys, vectors, checksums, rows)
        tokens, truncated = self.column("tokens", rows), self.column("truncated", rows)
        texts = pa.array(self.captions(keys, rows), pa.large_string()) if captions else None
        return StoredRows(keys, vectors, tokens, truncated, checksums, texts)

    def _slice(self, columns: list[np.ndarray], start: int, stop: int) -> np.ndarray:
        parts = []
        while start < stop:
            batch, row = divmod(start, self.batch_rows)
            part = columns[batch][row : row + stop - start]
            parts.append(part)
            start += len(part)
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else columns[0][:0]

    def column(self, name: str, rows: np.ndarray) -> np.ndarray:
        """`tokens` int32, `truncated` bool or `checksum` uint64 of the given rows: [n]."""
        if name == "truncated":
            return self._truncated(rows)
        if name not in self._columns:
            self._columns[name] = [number_values(batch.column(name)) for batch in self._batches]
        return self._gather(self._columns[name], rows)

    def _truncated(self, rows: np.ndarray) -> np.ndarray:
        if len(self._batches) == 1:
            return flag_values(self._batches[0].column("truncated"), rows)
        out = np.empty(len(rows), bool)
        batch_of = rows // self.batch_rows
        for b in np.unique(batch_of).tolist():
            here = batch_of == b
            out[here] = flag_values(self._batches[b].column("truncated"), rows[here] - b * self.batch_rows)
        return out

    def gather(self, keys: np.ndarray, rows: np.ndarray, *, check: bool) -> np.ndarray:
        """Vectors of the given rows, each compared with the key it is expected to have.

        Args:
            keys: uint8 [n, 16], what must be stored there.
            rows: int64 [n].
            check: compare row checksums too.

        Raises:
            CacheDamaged: a row holds another key, or its bytes are not those that were written.
        """
        if not np.array_equal(self.keys(rows), keys):
            raise CacheDamaged(f"{self.path} holds other keys than the index says; run `lift-cache verify`")
        vectors = self.vectors(rows)
        if check:
            self._require(keys, vectors, self.column("checksum", rows), rows)
        return vectors

    def _require(
        self, keys: np.ndarray, vectors: np.ndarray, checksums: np.ndarray, rows: np.ndarray
    ) -> None:
        wrong = np.flatnonzero(row_checksums(keys, vectors) != checksums)
        if len(wrong):
            raise CacheDamaged(
                f"{self.path}: row {rows[wrong[0]]} fails its checksum ({len(wrong)} such rows in this read); "
                "run `lift-cache verify`"
            )

    @property
    def has_captions(self) -> bool:
        """Whether the sibling is here."""
        return captions_path(self.directory, self.id).is_file()

    def captions(self, keys: np.ndarray, rows: np.ndarray) -> list[str]:
        """Captions of the given rows, each proved by the key it is expected to have.

        Raises:
            CacheDamaged: the sibling is not there, cannot be read, or holds other captions.
        """
        path = captions_path(self.directory, self.id)
        try:
            if self._siblings is None:
                reader = pa.ipc.open_file(pa.memory_map(str(path), "r"))
                self._siblings = [
                    _Texts(reader.get_batch(i).column("caption")) for i in range(reader.num_record_batches)
                ]
            found = [
                self._siblings[batch].text(row)
                for batch, row in zip(*np.divmod(rows, self.batch_rows), strict=True)
            ]
            right = all(caption_key(text) == key.tobytes() for text, key in zip(found, keys, strict=True))
        except FileNotFoundError:
            raise CacheDamaged(f"{path} is not here: this copy was made without captions") from None
        except (OSError, pa.ArrowException, KeyError, ValueError, IndexError, BadCaption) as error:
            raise CacheDamaged(f"{path} cannot be read ({_first_line(error)})") from None
        if not right:
            raise CacheDamaged(f"{path} holds other captions than its keys say; run `lift-cache verify`")
        return found

    def info(self) -> SegmentInfo:
        """What a registry says of it, read from the files."""
        captions = captions_path(self.directory, self.id)
        every = np.arange(self.rows)
        return SegmentInfo(
            id=self.id,
            rows=self.rows,
            size=self.path.stat().st_size,
            tokens=int(self.column("tokens", every).sum(dtype=np.int64)),
            truncated=int(self.column("truncated", every).sum()),
            captions_digest=self.captions_digest,
            captions_size=captions.stat().st_size if captions.exists() else 0,
        )


def _decoded(metadata: dict[bytes, bytes] | pa.KeyValueMetadata | None) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in (metadata or {}).items()}


def check_segment(directory: Path, segment_id: str, *, captions: bool = True) -> Segment:
    """Read every byte of a segment, and of its captions where they are here, and prove them.

    Args:
        captions: False leaves its captions alone.

    Returns:
        The open segment.

    Raises:
        CacheDamaged: the first thing that is wrong, naming the file.
    """
    path, sibling = segment_path(directory, segment_id), captions_path(directory, segment_id)
    try:
        if files.digest_file(path) != segment_id:
            raise CacheDamaged(f"{path}: its bytes are not those its name stands for")
        segment = Segment(directory, segment_id)
        has_captions = captions and sibling.exists()
        if has_captions and files.digest_file(sibling) != segment.captions_digest:
            raise CacheDamaged(f"{sibling}: its bytes are not those that {path.name} names")
    except FileNotFoundError:
        raise CacheDamaged(f"{path} is missing; restore it from a copy of the cache") from None
    except PermissionError:
        raise
    except OSError as error:  # a sector that cannot be read
        raise CacheDamaged(f"{path} cannot be read ({error.strerror})") from None
    before = b""
    for start in range(0, segment.rows, CHECK_ROWS):
        rows = segment.slice(start, min(start + CHECK_ROWS, segment.rows), captions=has_captions)
        high, low = halves(rows.keys)
        ascending = (high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] > low[:-1]))
        if not ascending.all() or rows.keys[0].tobytes() <= before:
            raise CacheDamaged(f"{path}: its keys are not in order")
        before = rows.keys[-1].tobytes()
    return segment


def segment_ids(directory: Path) -> list[str]:
    """Ids of the vector files in a directory, sorted."""
    return sorted(
        path.name.removesuffix(".arrow")
        for path in directory.glob("*.arrow")
        if not path.name.endswith(".captions.arrow") and not path.name.startswith(files.TEMPORARY)
    )


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
