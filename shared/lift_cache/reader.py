"""Reading a snapshot: keys in, vectors out, at the speed of memory.

Needs no LMDB, never writes, and may be used from any number of processes: it pickles as its path, so it is
safe under fork and spawn and in DataLoader workers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lift_cache.encoding import Encoding
from lift_cache.errors import CacheDamaged, CacheNotFound
from lift_cache.keys import KEY_BYTES, halves
from lift_cache.recipe import Recipe
from lift_cache.segment import Segment
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
        directory = self.path / "snapshots" / self.snapshot_id
        index = _read_batch(directory / "index.arrow", self.manifest.index.size)
        self._high, self._low, self._segment, self._row = (
            index.column(name).to_numpy() for name in ("key_high", "key_low", "segment", "row")
        )
        self._first = _read_batch(directory / "prefix.arrow", self.manifest.prefix.size).column(0).to_numpy()
        self._shift = np.uint64(64 - self.manifest.prefix_bits)
        # A bisection needs as many halvings as the fullest bucket has bits.
        self._halvings = int(np.diff(self._first).max(initial=0)).bit_length() if len(self._first) > 1 else 0
        self._segments: list[Segment] = []
        for info in self.manifest.segments:
            path = self.path / "segments" / f"{info.id}.arrow"
            if not path.is_file() or path.stat().st_size != info.size:
                raise CacheDamaged(
                    f"{path} is missing or not {info.size} bytes, but snapshot {self.snapshot_id} names it; "
                    "restore it from a copy of the cache"
                )
            segment = Segment(self.path / "segments", info.id)
            self.manifest.recipe.require_same(segment.recipe, here=self.snapshot_id, there=path.name)
            self.manifest.encoding.require_same(segment.encoding, here=self.snapshot_id, there=path.name)
            self._segments.append(segment)

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

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        return (
            f"CacheReader({str(self.path)!r}, snapshot {self.snapshot_id}, {self.rows} × {self.dimensions})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheReader, (f"{self.path}@{self.snapshot_id}",)

    def lookup(self, keys: np.ndarray) -> np.ndarray:
        """Rows of keys, -1 where the snapshot has none.

        Args:
            keys: uint8 [n, 16].

        Returns:
            int64 [n].
        """
        if not len(self._high) or not len(keys):
            return np.full(len(keys), -1, np.int64)
        high, low = halves(keys)
        bucket = (high >> self._shift).astype(np.int64)
        left = self._first[bucket].astype(np.int64)
        end = self._first[bucket + 1].astype(np.int64)
        right = end.copy()
        last = len(self._high) - 1
        for _ in range(self._halvings):
            middle = (left + right) >> 1
            before = (left < right) & (self._high[np.minimum(middle, last)] < high)
            left = np.where(before, middle + 1, left)
            right = np.where(before, right, middle)
        # Keys that share their first 64 bits stand side by side: step over those with another second half.
        at = np.minimum(left, last)
        step = (left < end) & (self._high[at] == high) & (self._low[at] < low)
        while step.any():
            left = left + step
            at = np.minimum(left, last)
            step = (left < end) & (self._high[at] == high) & (self._low[at] < low)
        found = (left < end) & (self._high[at] == high) & (self._low[at] == low)
        return np.where(found, left, -1)

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """Keys of rows: uint8 [n, 16]. Raises IndexError: a row outside the snapshot, such as -1."""
        rows = self._within(rows)
        pair = np.stack([self._high[rows], self._low[rows]], axis=1).astype(">u8")
        return pair.view(np.uint8).reshape(-1, KEY_BYTES)

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
        keys = self.keys(rows)
        where = self._row[rows].astype(np.int64)
        if len(self._segments) == 1:
            return self._segments[0].gather(keys, where, check=check)
        out = np.empty((len(rows), self.dimensions), self.encoding.numpy_dtype)
        for segment, here in self._by_segment(rows):
            out[here] = segment.gather(keys[here], where[here], check=check)
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
        out = np.empty(len(rows), object)
        where = self._row[rows].astype(np.int64)
        for segment, here in self._by_segment(rows):
            out[here] = segment.captions(keys[here], where[here])
        return out.tolist()

    def iter_keys(self, batch: int = 65_536) -> Iterator[np.ndarray]:
        """All keys in ascending order, uint8 [m, 16] at a time, m at most `batch`."""
        for start in range(0, self.rows, batch):
            yield self.keys(np.arange(start, min(start + batch, self.rows)))

    def _column(self, name: str, rows: np.ndarray, dtype: Any) -> np.ndarray:
        rows = self._within(rows)
        out = np.empty(len(rows), dtype)
        where = self._row[rows].astype(np.int64)
        for segment, here in self._by_segment(rows):
            out[here] = segment.column(name, where[here])
        return out

    def _within(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.rows):
            raise IndexError(f"rows must be in 0 … {self.rows - 1}; look missing captions up first")
        return rows

    def _by_segment(self, rows: np.ndarray) -> Iterator[tuple[Segment, np.ndarray]]:
        """The segments that hold the rows, each with a mask over `rows`."""
        number = self._segment[rows]
        for n in np.unique(number).tolist():
            yield self._segments[n], number == n


def _read_batch(path: Path, size: int) -> pa.RecordBatch:
    try:
        if path.stat().st_size != size:
            raise CacheDamaged(f"{path} is not {size} bytes long; make a new snapshot")
        return pa.ipc.open_file(pa.memory_map(str(path), "r")).get_batch(0)
    except (OSError, pa.ArrowException) as error:
        raise CacheDamaged(f"{path} cannot be read ({error}); make a new snapshot") from None
