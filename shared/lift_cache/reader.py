"""Reading a snapshot: keys in, vectors out, at the speed of memory.

Needs no LMDB, never writes, and may be used from any number of processes: it pickles as its path, so it is
safe under fork and spawn and in DataLoader workers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from lift_cache.encoding import Encoding
from lift_cache.errors import CacheDamaged, CacheNotFound
from lift_cache.flatmap import FlatMap, Unplaceable
from lift_cache.index import OpenIndex, merged_ranges
from lift_cache.keys import KEY_BYTES
from lift_cache.recipe import Recipe
from lift_cache.segment import Segment, StoredRows
from lift_cache.snapshot import find_snapshot, load_manifest, split_location


class CacheReader:
    """One snapshot of a cache.

    Attributes:
        manifest: counts, recipe, encoding, segments, provenance.
        snapshot_id: which snapshot this is.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        """Open `PATH` (the newest snapshot) or `PATH@ID`.

        Raises:
            CacheNotFound: no cache, or no such snapshot.
            CacheDamaged: a file that the snapshot names is missing or of another size.
            UnsupportedFormat: written by a newer version.
        """
        self.path, wanted = split_location(location)
        try:
            self._open(wanted)
        except PermissionError as error:
            raise CacheNotFound(
                f"{error.filename or self.path} may not be read by this user; give it the right to"
            ) from None

    def _open(self, wanted: str | None) -> None:
        self.snapshot_id = find_snapshot(self.path, wanted)
        self.manifest = load_manifest(self.path, self.snapshot_id)
        self._segments: list[Segment] = []
        for info in self.manifest.segments:
            path = self.path / "segments" / f"{info.id}.arrow"
            if not path.is_file() or path.stat().st_size != info.size:
                raise CacheDamaged(
                    f"{path} is missing or not {info.size} bytes, but snapshot {self.snapshot_id} names it; "
                    "restore it from a copy of the cache"
                )
            segment = Segment(self.path / "segments", info.id)
            if segment.fingerprint != self.manifest.fingerprint:
                self.manifest.recipe.require_same(segment.recipe, here=self.snapshot_id, there=path.name)
            self.manifest.encoding.require_same(segment.encoding, here=self.snapshot_id, there=path.name)
            self._segments.append(segment)
        directory = self.path / "snapshots" / self.snapshot_id
        if self.manifest.index:
            self._index = [OpenIndex.open(directory, k, part) for k, part in enumerate(self.manifest.index)]
            numbers = {segment.id: number for number, segment in enumerate(self._segments)}
            self._numbers = [
                np.array([numbers[segment_id] for segment_id in part.segments], np.int64)
                for part in self.manifest.index
            ]
        else:  # format 1, whose index had other columns
            self._index = [OpenIndex.over(self._segments)]
            self._numbers = [np.arange(len(self._segments))]
        self._starts = np.cumsum([0, *(part.rows for part in self._index)])
        if self._starts[-1] != self.manifest.rows:
            raise CacheDamaged(f"{directory} has other rows than its manifest says; make a new snapshot")
        self._map()

    def _map(self) -> None:
        """Map keys and vectors of all segments into one array each, so that a gather is one `take`."""
        batches = [len(segment.key_extents()) for segment in self._segments]
        self._first_batch = np.cumsum([0, *batches])[:-1]
        self._segment_rows = np.array([segment.rows for segment in self._segments], np.int64)
        self._one_batch_each = all(count == 1 for count in batches)
        self._batch_rows = max((segment.batch_rows for segment in self._segments), default=1)
        self._keys = self._vectors = None
        try:
            for segment, count in zip(self._segments, batches, strict=True):
                if count > 1 and segment.batch_rows != self._batch_rows:
                    raise Unplaceable(str(segment.path))
            self._keys = FlatMap(
                [extent for segment in self._segments for extent in segment.key_extents()],
                KEY_BYTES,
                random=True,
            )
            self._vectors = FlatMap(
                [extent for segment in self._segments for extent in segment.vector_extents()],
                self.dimensions * self.encoding.numpy_dtype.itemsize,
                random=True,
            )
        except (Unplaceable, OSError):  # segments of format 1, or too many to map: they are read one by one
            self._keys = self._vectors = None
            return
        # What is added to a row of a segment to have its number in the map, batch by batch.
        before = [
            batch * segment.batch_rows
            for segment, count in zip(self._segments, batches, strict=True)
            for batch in range(count)
        ]
        self._key_base = self._keys.first - np.array(before, np.int64)
        self._vector_base = self._vectors.first - np.array(before, np.int64)

    @property
    def recipe(self) -> Recipe:
        return self.manifest.recipe

    @property
    def encoding(self) -> Encoding:
        return self.manifest.encoding

    @property
    def rows(self) -> int:
        return self.manifest.rows

    @property
    def dimensions(self) -> int:
        return self.manifest.encoding.dimensions

    @property
    def flat(self) -> bool:
        """Whether all segments are mapped as one array; those of format 1 are not, and gathers are slower."""
        return self._vectors is not None

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        return (
            f"CacheReader({str(self.path)!r}, snapshot {self.snapshot_id}, {self.rows} × {self.dimensions})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheReader, (f"{self.path.absolute()}@{self.snapshot_id}",)

    def lookup(self, keys: np.ndarray) -> np.ndarray:
        """Rows of keys, -1 where the snapshot has none.

        Args:
            keys: uint8 [n, 16].

        Returns:
            int64 [n].
        """
        rows = self._index[0].lookup(keys)
        for part, start in zip(self._index[1:], self._starts[1:], strict=False):
            missing = np.flatnonzero(rows < 0)
            if not len(missing):
                break
            found = part.lookup(keys[missing])
            rows[missing] = np.where(found < 0, -1, found + start)
        return rows

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """Keys of rows: uint8 [n, 16]. Raises IndexError: a row outside the snapshot, such as -1."""
        return self._keys_of(self._within(rows))

    def _keys_of(self, rows: np.ndarray) -> np.ndarray:
        """As `keys`, of rows that are known to be within."""
        if len(self._index) == 1:
            return self._index[0].keys(rows)
        out = np.empty((len(rows), KEY_BYTES), np.uint8)
        for k, here in self._by_part(rows):
            out[here] = self._index[k].keys(rows[here] - self._starts[k])
        return out

    def gather(self, rows: np.ndarray, *, check: bool = False) -> np.ndarray:
        """Stored vectors of rows, each compared with the key that the index has for it.

        Args:
            rows: int64 [n], as `lookup` returned them; no -1.
            check: verify every row's checksum too.

        Returns:
            [n, dimensions] in the stored dtype.

        Raises:
            CacheDamaged: a row holds another key or, with `check`, other bytes.
            IndexError: a row outside the snapshot.
        """
        rows = np.asarray(rows, np.int64)
        segment, row = self._locate(rows)
        keys = self._keys_of(rows)
        if self._keys is not None and self._vectors is not None and not check:
            batch = self._first_batch.take(segment)
            if not self._one_batch_each:
                batch += row // self._batch_rows
            held = self._keys.take(self._key_base.take(batch) + row, np.uint64)
            if (held != keys.view(np.uint64)).any():
                raise CacheDamaged(
                    f"{self.path}: segments hold other keys than snapshot {self.snapshot_id} says; "
                    "run `lift-cache verify`"
                )
            return self._vectors.take(self._vector_base.take(batch) + row, self.encoding.numpy_dtype)
        out = np.empty((len(segment), self.dimensions), self.encoding.numpy_dtype)
        for one, here in self._by_segment(segment):
            out[here] = one.gather(keys[here], row[here], check=check)
        return out

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        """Token counts of rows: int32 [n]."""
        return self._column("tokens", rows, np.int32)

    def truncated(self, rows: np.ndarray) -> np.ndarray:
        """Whether the caption of each row was cut: bool [n]."""
        return self._column("truncated", rows, np.bool_)

    def captions(self, rows: np.ndarray) -> list[str]:
        """Caption texts of rows. Raises CacheDamaged where the copy was made without captions."""
        keys = self.keys(rows)
        segment, row = self._locate(rows)
        out = np.empty(len(segment), object)
        for one, here in self._by_segment(segment):
            out[here] = one.captions(keys[here], row[here])
        return out.tolist()

    def iter_keys(self, batch: int = 65_536) -> Iterator[np.ndarray]:
        """All keys in ascending order, uint8 [m, 16] at a time, m at most `batch`."""
        if len(self._index) > 1:
            for part in merged_ranges(self._segments):
                for start in range(0, len(part.keys), batch):
                    yield part.keys[start : start + batch]
            return
        for start in range(0, self.rows, batch):
            yield self.keys(np.arange(start, min(start + batch, self.rows)))

    def iter_rows(self, batch: int = 8_192, *, captions: bool = False) -> Iterator[StoredRows]:
        """Every row once, in the order of storage, every checksum verified; at most `batch` rows at a time.

        Raises:
            CacheDamaged: bytes that are not those that were written, or captions that are not here.
        """
        repeated = sum(segment.rows for segment in self._segments) != self.rows
        for number, segment in enumerate(self._segments):
            for start in range(0, segment.rows, batch):
                rows = segment.slice(start, min(start + batch, segment.rows), captions=captions)
                if repeated:  # a caption that two segments hold: the index names one of them
                    named, _ = self._locate(self.lookup(rows.keys))
                    rows = rows.take(np.flatnonzero(named == number))
                yield rows

    def _column(self, name: str, rows: np.ndarray, dtype: Any) -> np.ndarray:
        segment, row = self._locate(rows)
        out = np.empty(len(segment), dtype)
        for one, here in self._by_segment(segment):
            out[here] = one.column(name, row[here])
        return out

    def _within(self, rows: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(rows, np.int64)
        if len(rows) and rows.view(np.uint64).max() >= self.rows:  # a negative number is a huge one, unsigned
            raise IndexError(f"rows must be in 0 … {self.rows - 1}; look missing captions up first")
        return rows

    def _locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Segment and row within it of each row: int64 [n], int64 [n]."""
        rows = self._within(rows)
        if len(self._index) == 1:
            segment, row = self._index[0].locations(rows)
            segment = self._numbers[0].take(segment, mode="clip")
        else:
            segment, row = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
            for k, here in self._by_part(rows):
                number, row[here] = self._index[k].locations(rows[here] - self._starts[k])
                segment[here] = self._numbers[k].take(number, mode="clip")
        if not len(self._segments):
            return segment, row
        if (row >= self._segment_rows.take(segment)).any():  # a damaged index must not lead into a gap
            raise CacheDamaged(
                f"{self.path}: the index of snapshot {self.snapshot_id} points outside of its segments; "
                "run `lift-cache verify`"
            )
        return segment, row

    def _by_part(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Parts of the index that have some of the rows, each with positions in `rows`."""
        part = np.searchsorted(self._starts, rows, side="right") - 1
        for k in range(len(self._index)):
            here = np.flatnonzero(part == k)
            if len(here):
                yield k, here

    def _by_segment(self, segment: np.ndarray) -> Iterator[tuple[Segment, np.ndarray]]:
        """The segments that are asked for, each with positions in `segment`."""
        if len(self._segments) == 1:
            yield self._segments[0], np.arange(len(segment))
            return
        for number in np.unique(segment).tolist():
            yield self._segments[number], np.flatnonzero(segment == number)
