"""A sealed segment: rows sorted by key in one immutable Arrow file, with their captions in a sibling.

    <id>.arrow            key · vector · tokens · truncated · checksum     (what trainers read)
    <id>.captions.arrow   key · caption                                    (may be left out of a copy)

The id is the BLAKE2b-128 digest of the file's own bytes, and the file's metadata holds the digest of its
sibling, the recipe and the encoding: a segment describes and proves itself, wherever it is copied to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import BaseModel, ConfigDict

from lift_cache import files
from lift_cache.encoding import Encoding
from lift_cache.errors import BadCaption, CacheDamaged, UnsupportedFormat
from lift_cache.keys import KEY_BYTES, caption_key, halves, sort_order
from lift_cache.recipe import Recipe

FORMAT_VERSION = 1
MAX_CHILD_VALUES = 2**31 - 1
"""Arrow's fixed-size lists address their values with 32 bits, per record batch."""

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


def list_values(array: pa.Array, dimensions: int) -> np.ndarray:
    """An Arrow vector column as [n, d], without a copy."""
    values = array.values.to_numpy(zero_copy_only=True).reshape(-1, dimensions)
    return values[array.offset : array.offset + len(array)]


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


def write_segment(directory: Path, recipe: Recipe, encoding: Encoding, rows: StoredRows) -> SegmentInfo:
    """Write one segment durably; captions first, so that a vector file is never without its sibling.

    Rows may come in any order and must have distinct keys. Writing the same rows twice gives the same id.

    Raises:
        CacheFull: no room; nothing under a final name is left of this segment but, perhaps, its captions.
    """
    rows = rows.take(sort_order(rows.keys))
    batch_rows = max(1, MAX_CHILD_VALUES // encoding.dimensions)
    vectors_tmp = files.temporary_name(directory / "segment.arrow")
    captions_tmp = files.temporary_name(directory / "captions.arrow")
    with files.room_for(directory):
        try:
            captions = pa.RecordBatch.from_arrays(
                [binary_array(rows.keys), rows.captions], schema=CAPTIONS_SCHEMA
            )
            _write_arrow(captions_tmp, CAPTIONS_SCHEMA, captions, batch_rows)
            captions_digest = files.digest_file(captions_tmp)

            schema = vector_schema(encoding).with_metadata(
                {
                    "lift.format": str(FORMAT_VERSION),
                    "lift.recipe": recipe.canonical_json(),
                    "lift.fingerprint": recipe.fingerprint,
                    "lift.encoding": encoding.model_dump_json(),
                    "lift.captions": captions_digest,
                }
            )
            _write_arrow(vectors_tmp, schema, rows.vector_batch(schema), batch_rows)
            info = SegmentInfo(
                id=files.digest_file(vectors_tmp),
                rows=len(rows),
                size=vectors_tmp.stat().st_size,
                tokens=int(rows.tokens.sum()),
                truncated=int(rows.truncated.sum()),
                captions_digest=captions_digest,
                captions_size=captions_tmp.stat().st_size,
            )
            files.publish(captions_tmp, captions_path(directory, info.id))
            files.publish(vectors_tmp, segment_path(directory, info.id))
        finally:
            vectors_tmp.unlink(missing_ok=True)
            captions_tmp.unlink(missing_ok=True)
    return info


def _write_arrow(path: Path, schema: pa.Schema, batch: pa.RecordBatch, batch_rows: int) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(batch), batch_rows):
            writer.write_batch(batch.slice(start, batch_rows))


class Segment:
    """A sealed segment, memory-mapped.

    Attributes:
        rows: number of rows.
        recipe, encoding: as the file states them.
    """

    def __init__(self, directory: Path, segment_id: str) -> None:
        """Raises CacheDamaged (missing, not readable) and UnsupportedFormat (newer format)."""
        self.id = segment_id
        self.directory = directory
        self.path = segment_path(directory, segment_id)
        try:
            source = pa.memory_map(str(self.path), "r")
            reader = pa.ipc.open_file(source)
            metadata = {k.decode(): v.decode() for k, v in (reader.schema.metadata or {}).items()}
            version = int(metadata["lift.format"])
            if version > FORMAT_VERSION:
                raise UnsupportedFormat(
                    f"{self.path} has format version {version}; this software reads {FORMAT_VERSION}: update it"
                )
            self.recipe = Recipe.parse(metadata["lift.recipe"], where=str(self.path))
            self.encoding = Encoding.model_validate_json(metadata["lift.encoding"])
            self.captions_digest = metadata["lift.captions"]
            if not reader.schema.equals(vector_schema(self.encoding)):
                raise CacheDamaged(f"{self.path} has other columns than a segment; run `lift-cache verify`")
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except FileNotFoundError:
            raise CacheDamaged(f"{self.path} is missing; restore it from a copy of the cache") from None
        except (OSError, pa.ArrowException, KeyError, ValueError, UnicodeDecodeError) as error:
            raise CacheDamaged(
                f"{self.path} cannot be read ({_first_line(error)}); run `lift-cache verify`"
            ) from None
        dimensions = self.encoding.dimensions
        self._keys = [binary_values(batch.column(0)) for batch in self._batches]
        self._vectors = [list_values(batch.column(1), dimensions) for batch in self._batches]
        self.rows = sum(len(batch) for batch in self._batches)
        # Every batch but the last is of one length, so a row's batch is a division.
        self._batch_rows = max(1, len(self._batches[0]) if self._batches else 1)

    def _gather(self, columns: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
        if len(columns) == 1:
            return columns[0].take(rows, axis=0)
        out = np.empty((len(rows), *columns[0].shape[1:]), columns[0].dtype)
        batch_of = rows // self._batch_rows
        for b in np.unique(batch_of).tolist():
            here = batch_of == b
            out[here] = columns[b][rows[here] - b * self._batch_rows]
        return out

    def keys(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Keys of the given rows (all of them by default): uint8 [n, 16]."""
        if rows is None:
            return np.concatenate(self._keys) if len(self._keys) != 1 else self._keys[0]
        return self._gather(self._keys, rows)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Stored vectors of the given rows, copied: [n, d]."""
        return self._gather(self._vectors, rows)

    def column(self, name: str, rows: np.ndarray) -> np.ndarray:
        """`tokens` int32, `truncated` bool or `checksum` uint64 of the given rows: [n]."""
        return self._gather(
            [batch.column(name).to_numpy(zero_copy_only=False) for batch in self._batches], rows
        )

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
            wrong = np.flatnonzero(row_checksums(keys, vectors) != self.column("checksum", rows))
            if len(wrong):
                raise CacheDamaged(
                    f"{self.path}: row {rows[wrong[0]]} fails its checksum ({len(wrong)} such rows in this read); "
                    "run `lift-cache verify`"
                )
        return vectors

    def captions(self, keys: np.ndarray, rows: np.ndarray) -> list[str]:
        """Captions of the given rows, each compared with the key it is expected to have.

        Raises:
            CacheDamaged: the sibling is not there, cannot be read, or holds other keys.
        """
        path = captions_path(self.directory, self.id)
        try:
            taken = pa.ipc.open_file(pa.memory_map(str(path), "r")).read_all().take(pa.array(rows))
            held, captions = taken.column("key").to_pylist(), taken.column("caption").to_pylist()
        except FileNotFoundError:
            raise CacheDamaged(f"{path} is not here: this copy was made without captions") from None
        except (OSError, pa.ArrowException, KeyError) as error:
            raise CacheDamaged(f"{path} cannot be read ({_first_line(error)})") from None
        if b"".join(held) != keys.tobytes():
            raise CacheDamaged(f"{path} holds other keys than the index says; run `lift-cache verify`")
        return captions

    def info(self) -> SegmentInfo:
        """What a registry says of it, read from the files."""
        every = np.arange(self.rows)
        captions = captions_path(self.directory, self.id)
        return SegmentInfo(
            id=self.id,
            rows=self.rows,
            size=self.path.stat().st_size,
            tokens=int(self.column("tokens", every).sum()),
            truncated=int(self.column("truncated", every).sum()),
            captions_digest=self.captions_digest,
            captions_size=captions.stat().st_size if captions.exists() else 0,
        )


def check_segment(directory: Path, segment_id: str, *, need_captions: bool) -> Segment:
    """Read every byte of a segment and prove it.

    Returns:
        The open segment.

    Raises:
        CacheDamaged: the first thing that is wrong, naming the file.
    """
    path, sibling = segment_path(directory, segment_id), captions_path(directory, segment_id)
    try:
        if files.digest_file(path) != segment_id:
            raise CacheDamaged(f"{path}: its bytes are not those its name stands for")
    except FileNotFoundError:
        raise CacheDamaged(f"{path} is missing; restore it from a copy of the cache") from None
    segment = Segment(directory, segment_id)
    every = np.arange(segment.rows)
    keys = segment.keys()
    high, low = halves(keys)
    ascending = (high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] > low[:-1]))
    if not ascending.all():
        raise CacheDamaged(f"{path}: its keys are not in order")
    segment.gather(keys, every, check=True)
    if not sibling.exists() and not need_captions:
        return segment
    try:
        if files.digest_file(sibling) != segment.captions_digest:
            raise CacheDamaged(f"{sibling}: its bytes are not those that {path.name} names")
    except FileNotFoundError:
        raise CacheDamaged(f"{sibling} is missing; restore it from a copy of the cache") from None
    for row, (key, caption) in enumerate(zip(keys, segment.captions(keys, every), strict=True)):
        try:
            right = caption_key(caption) == key.tobytes()
        except BadCaption:
            right = False
        if not right:
            raise CacheDamaged(f"{sibling}: row {row} is not the caption of its key")
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
