"""The index of a snapshot: sorted caption keys → where their rows are.

    index-<k>.arrow    key · location (segment in the upper, row in the lower 32 bits)
    prefix-<k>.arrow   for every value of the keys' leading bits, the first row of the index that has it

Keys are hashes, so an entry of the prefix table stands for one key or none: a lookup is one read of the table and
one or two of the index, vectorised. An index is built range by range of the key space, in memory that does not
grow with it. A large snapshot has a base and a few deltas (k = 0, 1, …), so that a new snapshot of a large cache
does not write the whole index again; a key is in one of them only.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from lift_cache import files
from lift_cache.errors import CacheDamaged
from lift_cache.keys import KEY_BYTES, first_of_each, halves
from lift_cache.segment import Segment, binary_array, binary_values, number_values

INDEX_SCHEMA = pa.schema([("key", pa.binary(KEY_BYTES)), ("location", pa.uint64())])
ROW_BYTES = KEY_BYTES + 8 + 8
"""Bytes of index per caption, the prefix table among it."""

RANGE_ROWS = 1 << 20
"""Rows of one range while an index is built: about 100 bytes of memory each."""

MAX_BITS = 40
PROBES = 10_000
BOTH = 0x0101
"""Two bools, both true, as one number."""


class FileInfo(BaseModel):
    """Size in bytes and BLAKE2b-128 digest of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    digest: str


class IndexPart(BaseModel):
    """The base (number 0) or a delta. `segments` are ids; a location's segment is a position in this list."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int
    tokens: int
    truncated: int
    prefix_bits: int
    segments: tuple[str, ...]
    index: FileInfo
    prefix: FileInfo


def index_name(number: int) -> str:
    return f"index-{number}.arrow"


def prefix_name(number: int) -> str:
    return f"prefix-{number}.arrow"


class OpenIndex:
    """One part of an index.

    Attributes:
        rows: number of keys.
    """

    def __init__(
        self, keys: np.ndarray, location: np.ndarray, first: np.ndarray, bits: int, where: str
    ) -> None:
        """Use `OpenIndex.open` or `OpenIndex.over`.

        Args:
            keys: uint8 [n, 16], ascending.
            location: uint64 [n].
            first: uint32 or uint64 [2**bits + 1].
        """
        self.rows = len(keys)
        self._keys, self._location, self._first = keys.view(np.uint64), location, first
        # Halves of keys, the even ones first halves; without the last, so that clipping ends at a first half.
        self._halves = self._keys.reshape(-1)[:-1]
        self._shift, self._where = np.uint64(64 - bits), where

    @classmethod
    def open(cls, directory: Path, number: int, part: IndexPart) -> OpenIndex:
        """Map a part of a snapshot. Raises CacheDamaged: a file is missing, of another size, or not an index."""
        path = directory / index_name(number)
        batch = _read_batch(path, part.index.size)
        table = _read_batch(directory / prefix_name(number), part.prefix.size)
        try:
            keys = binary_values(batch.column("key"))
            location, first = number_values(batch.column("location")), number_values(table.column("first"))
        except (KeyError, ValueError, TypeError, IndexError, NotImplementedError, pa.ArrowException):
            raise CacheDamaged(f"{path} is not an index; make a new snapshot") from None
        if not len(keys) == len(location) == part.rows or len(first) != 2**part.prefix_bits + 1:
            raise CacheDamaged(f"{path} has other rows than its manifest says; make a new snapshot")
        return cls(keys, location, first, part.prefix_bits, str(path))

    @classmethod
    def over(cls, segments: Sequence[Segment]) -> OpenIndex:
        """Make an index of segments in memory."""
        ranges = list(merged_ranges(segments))
        keys = np.concatenate([np.zeros((0, KEY_BYTES), np.uint8), *(part.keys for part in ranges)])
        location = np.concatenate([np.zeros(0, np.uint64), *(part.location for part in ranges)])
        bits = prefix_bits(len(keys))
        bucket = halves(keys)[0] >> np.uint64(64 - bits)
        first = np.searchsorted(bucket, np.arange(2**bits + 1, dtype=np.uint64))
        return cls(keys, location, first.astype(np.uint64), bits, "the index")

    def lookup(self, keys: np.ndarray) -> np.ndarray:
        """Rows of keys (uint8 [n, 16]), -1 where there is none: int64 [n].

        Raises:
            CacheDamaged: the prefix table cannot be right.
        """
        if not self.rows or not len(keys):
            return np.full(len(keys), -1, np.int64)
        wanted = np.ascontiguousarray(keys).view(np.uint64)
        high = wanted[:, 0].byteswap()
        first = self._first.take((high >> self._shift).view(np.int64))
        if first.max() > self.rows:
            raise CacheDamaged(f"{self._where} has a prefix table of another index; make a new snapshot")
        at = first.astype(np.int64)
        # Step to the first row that is not below. Few keys share their leading bits: two steps are enough for nearly
        # all, and to take all of them along costs less than to pick out those that need a step.
        at += self._below(at, high)
        below = self._below(at, high)
        at += below
        left = np.flatnonzero(below)
        for _ in range(PROBES):
            if not len(left):
                break
            left = left[self._below(at[left], high[left])]
            at[left] += 1
        else:
            raise CacheDamaged(f"{self._where} has a prefix table of another index; make a new snapshot")
        np.minimum(at, self.rows - 1, out=at)
        there = self._keys.take(at, axis=0)
        same = (there == wanted).view(np.uint16).ravel() == BOTH
        found = np.where(same, at, -1)
        if not same.all():
            for i in np.flatnonzero(~same & (there[:, 0] == wanted[:, 0])).tolist():
                found[i] = self._beyond(int(at[i]), wanted[i])
        return found

    def _below(self, at: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Whether the first halves of the keys at rows are below `high`: bool [n], False beyond the last row."""
        return (self._halves.take(2 * at, mode="clip").byteswap() < high) & (at < self.rows)

    def _beyond(self, row: int, wanted: np.ndarray) -> int:
        """The row after `row` that has a key, where several keys have the same first half; -1 when there is none."""
        while row < self.rows and self._keys[row, 0] == wanted[0]:
            if self._keys[row, 1] == wanted[1]:
                return row
            row += 1
        return -1

    def locations(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where rows are: position of the segment in the part's list int64 [n], row in it int64 [n]."""
        location = self._location.take(rows)
        return (location >> np.uint64(32)).view(np.int64), (location & np.uint64(0xFFFFFFFF)).view(np.int64)

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """Keys of rows: uint8 [n, 16]."""
        return self._keys.take(rows, axis=0).view(np.uint8).reshape(-1, KEY_BYTES)


@dataclass(frozen=True)
class Range:
    """Rows of the index whose keys share their leading bits, in ascending order of key.

    keys uint8 [n, 16] · high uint64 [n] · location uint64 [n] · tokens int32 [n] · truncated bool [n].
    """

    keys: np.ndarray
    high: np.ndarray
    location: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray

    def take(self, rows: np.ndarray) -> Range:
        return Range(
            self.keys[rows], self.high[rows], self.location[rows], self.tokens[rows], self.truncated[rows]
        )


def merged_ranges(
    segments: Sequence[Segment], progress: Callable[[int], None] = lambda _: None
) -> Iterator[Range]:
    """Keys of several segments in one ascending order, range by range; of equal keys the first segment's.

    Args:
        progress: called with the rows that were read.
    """
    if not segments:
        return
    total = sum(segment.rows for segment in segments)
    bits = range_bits(total)
    starts = [0] * len(segments)
    for number in range(2**bits):
        bound = (number + 1) << (64 - bits)
        ends = [segment.rows if number + 1 == 2**bits else segment.first_from(bound) for segment in segments]
        keys = np.concatenate(
            [segment.key_slice(a, b) for segment, a, b in zip(segments, starts, ends, strict=True)]
        )
        rows = [np.arange(a, b) for a, b in zip(starts, ends, strict=True)]
        starts = ends
        if not len(keys):
            continue
        progress(len(keys))
        location = np.concatenate([row.astype(np.uint64) | np.uint64(s << 32) for s, row in enumerate(rows)])
        tokens = np.concatenate([s.column("tokens", row) for s, row in zip(segments, rows, strict=True)])
        truncated = np.concatenate(
            [s.column("truncated", row) for s, row in zip(segments, rows, strict=True)]
        )
        first = first_of_each(keys)
        keys = keys[first]
        yield Range(keys, halves(keys)[0], location[first], tokens[first], truncated[first])


def range_bits(rows: int) -> int:
    """Leading bits that split the key space so that a range has at most about `RANGE_ROWS` keys."""
    return max(0, (rows // RANGE_ROWS).bit_length())


def prefix_bits(rows: int) -> int:
    """Leading bits in the prefix table, so that there are one to two entries for a key."""
    return min(MAX_BITS, max(1, range_bits(rows), rows.bit_length()))


def build_index(
    directory: Path,
    number: int,
    segments: Sequence[Segment],
    known: Callable[[np.ndarray], np.ndarray] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> IndexPart:
    """Write one part of an index durably into a directory that is not a snapshot yet.

    Args:
        known: keys uint8 [n, 16] → bool [n], which of them an earlier part has; they are left out.
        progress: called with the rows that were read.

    Raises:
        CacheFull, CacheDamaged.
    """
    bits = prefix_bits(sum(segment.rows for segment in segments))
    wide: np.dtype = np.dtype(np.uint64 if sum(segment.rows for segment in segments) >= 2**32 else np.uint32)
    scratch = [directory / f"{files.TEMPORARY}{number}-{name}" for name in ("key", "location", "first")]
    rows = tokens = truncated = entries = 0
    try:
        with (
            scratch[0].open("wb") as key_file,
            scratch[1].open("wb") as location_file,
            scratch[2].open("wb") as first_file,
        ):
            for found in merged_ranges(segments, progress):
                part = found if known is None else found.take(np.flatnonzero(~known(found.keys)))
                if not len(part.keys):
                    continue
                bucket = (part.high >> np.uint64(64 - bits)).astype(np.int64)
                last = int(bucket[-1])
                # Entry b is the first row whose leading bits are at least b.
                counts = np.bincount(bucket - entries)
                first = rows + np.cumsum(counts) - counts
                first_file.write(first.astype(wide).tobytes())
                entries = last + 1
                key_file.write(part.keys.tobytes())
                location_file.write(part.location.tobytes())
                rows += len(part.keys)
                tokens += int(part.tokens.sum(dtype=np.int64))
                truncated += int(part.truncated.sum())
            for start in range(entries, 2**bits + 1, RANGE_ROWS):
                stop = min(start + RANGE_ROWS, 2**bits + 1)
                first_file.write(np.full(stop - start, rows, wide).tobytes())
        key, location, first = (
            _mapped(scratch[0], np.dtype(np.uint8)),
            _mapped(scratch[1], np.dtype(np.uint64)),
            _mapped(scratch[2], wide),
        )
        index = pa.RecordBatch.from_arrays(
            [binary_array(key.reshape(-1, KEY_BYTES)), pa.array(location)], schema=INDEX_SCHEMA
        )
        table = pa.RecordBatch.from_arrays([pa.array(first)], names=["first"])
        return IndexPart(
            rows=rows,
            tokens=tokens,
            truncated=truncated,
            prefix_bits=bits,
            segments=tuple(segment.id for segment in segments),
            index=_write_batch(directory / index_name(number), index),
            prefix=_write_batch(directory / prefix_name(number), table),
        )
    finally:
        for path in scratch:
            path.unlink(missing_ok=True)


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file as an array, its pages mapped at once: what is written from pages that are not goes to the page cache
    piece by piece, and is never mapped in huge pages when it is read."""
    size = path.stat().st_size
    if not size:
        return np.zeros(0, dtype)
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), size, flags, mmap.PROT_READ), dtype)


def _write_batch(path: Path, batch: pa.RecordBatch) -> FileInfo:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    files.sync_file(path)
    return file_info(path)


def _read_batch(path: Path, size: int) -> pa.RecordBatch:
    try:
        if path.stat().st_size != size:
            raise CacheDamaged(f"{path} is not {size} bytes; restore it from a copy or make a new snapshot")
        batch = pa.ipc.open_file(pa.memory_map(str(path), "r")).get_batch(0)
        batch.validate()  # buffers are as long as the rows need
        return batch
    except FileNotFoundError:
        raise CacheDamaged(f"{path} is missing; restore it from a copy or make a new snapshot") from None
    except PermissionError:
        raise
    except (OSError, pa.ArrowException, IndexError) as error:
        raise CacheDamaged(f"{path} cannot be read ({error}); make a new snapshot") from None


def file_info(path: Path) -> FileInfo:
    """Read a file whole. Raises OSError."""
    return FileInfo(size=path.stat().st_size, digest=files.digest_file(path))


def require_file(path: Path, info: FileInfo) -> None:
    """Read every byte of a file. Raises CacheDamaged: it is missing, or not what was written."""
    if not path.is_file() or files.digest_file(path) != info.digest:
        raise CacheDamaged(
            f"{path} is missing or its bytes are not those that were written; make a new snapshot"
        )
