"""Writing a whole cache at once, without a live tier: sealed segments and a snapshot over them.

Needs no LMDB, so it works wherever Arrow does: for imports, conversions, text controls, and in tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from lift_cache import files
from lift_cache.encoding import Encoding
from lift_cache.errors import VectorRejected
from lift_cache.keys import keyed, normalise
from lift_cache.lock import WriterLock
from lift_cache.provenance import save_provenance
from lift_cache.recipe import Recipe
from lift_cache.segment import (
    SegmentInfo,
    SegmentWriter,
    StoredRows,
    require_lengths,
    row_bytes,
    row_checksums,
)
from lift_cache.snapshot import Snapshot, build_snapshot

SEGMENT_BYTES = 1 << 29
"""Bytes of vectors that are collected before they become a segment, where no number of rows is asked for."""


class BulkWriter:
    """A new cache, written from rows that are at hand.

    Rows are durable when `finish` returns; a cache that was not finished has no snapshot.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        recipe: Recipe,
        encoding: Encoding | None = None,
        *,
        segment_rows: int | None = None,
        provenance: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Begin.

        Args:
            path: a directory that is empty or does not exist.
            encoding: float16 over all dimensions by default.
            segment_rows: rows that become a segment; as many as make half a gigabyte by default.
            provenance: what made the vectors, for the snapshot.

        Raises:
            BadConfig: the directory holds something already.
            CacheFull, CacheLocked.
        """
        self.path, self.recipe = Path(path), recipe
        self.encoding = encoding or Encoding(dimensions=recipe.dimensions)
        self._segment_rows = segment_rows or max(1, SEGMENT_BYTES // row_bytes(self.encoding))
        self._provenance = list(provenance)
        self._waiting: list[StoredRows] = []
        self._waiting_rows = 0
        self._infos: list[SegmentInfo] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="bulk")
        self._writing: Future[list[SegmentInfo]] | None = None
        self._segments_dir = self.path / "segments"
        files.refuse_other_content(self.path)
        files.make_directory(self.path)
        self._lock = WriterLock(self.path)
        try:
            files.refuse_other_content(self.path)
            self.encoding.save(self.path / "encoding.json")
            recipe.save(self.path / "recipe.json")
            if self._provenance:
                save_provenance(self.path, self._provenance)
            files.make_directory(self._segments_dir)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> BulkWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.shutdown(wait=True)
        self._lock.release()

    def add(
        self,
        captions: Sequence[str],
        vectors: np.ndarray,
        tokens: np.ndarray | None = None,
        truncated: np.ndarray | None = None,
    ) -> dict[int, str]:
        """Add rows; of equal captions the first counts.

        Args:
            captions: n texts.
            vectors: float32 [n, d].
            tokens: int32 [n], zeros by default.
            truncated: bool [n], False by default.

        Returns:
            Row → reason, for rows that cannot be stored.

        Raises:
            CacheFull, EncodingMismatch.
        """
        n = len(captions)
        tokens = np.zeros(n, np.int32) if tokens is None else np.asarray(tokens, np.int32)
        truncated = np.zeros(n, bool) if truncated is None else np.asarray(truncated, bool)
        require_lengths(captions, vectors, tokens, truncated)
        stored, bad = self.encoding.encode(np.asarray(vectors, np.float32))
        texts, keys, unusable = keyed(captions)
        bad = unusable | bad
        rows = StoredRows(
            keys, stored, tokens, truncated, row_checksums(keys, stored), pa.array(texts, pa.large_string())
        )
        if bad:
            rows = rows.take(np.array([row for row in range(n) if row not in bad], np.int64))
        self.add_stored(rows)
        return bad

    def add_stored(self, rows: StoredRows) -> None:
        """Add rows in their stored form. Raises CacheFull."""
        self._waiting.append(rows)
        self._waiting_rows += len(rows)
        if self._waiting_rows >= self._segment_rows:
            self._write()

    def finish(self, progress: Callable[[int], None] = lambda _: None) -> Snapshot:
        """Write what is left and make the snapshot.

        Args:
            progress: called with the rows that were indexed.

        Raises:
            CacheFull.
        """
        self._write()
        self._wait()
        return build_snapshot(self.path, self.recipe, self.encoding, self._infos, self._provenance, progress)

    def _write(self) -> None:
        """Write what waits, while more comes in: one at a time, so that no more than two segments are in memory."""
        self._wait()
        if self._waiting_rows:
            self._writing = self._writer.submit(self._write_segments, self._waiting)
        self._waiting = []
        self._waiting_rows = 0

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._infos += writing.result()

    def _write_segments(self, parts: list[StoredRows]) -> list[SegmentInfo]:
        rows, infos = StoredRows.in_order(parts), []
        for start in range(0, len(rows), self._segment_rows):
            with SegmentWriter(self._segments_dir, self.recipe, self.encoding) as segment:
                segment.add(rows.slice(start, start + self._segment_rows))
                infos.append(segment.finish())
        return infos


def write_cache(
    path: str | os.PathLike[str],
    recipe: Recipe,
    encoding: Encoding,
    captions: Sequence[str],
    vectors: np.ndarray,
    tokens: np.ndarray | None = None,
    truncated: np.ndarray | None = None,
    *,
    segment_rows: int | None = None,
) -> Snapshot:
    """Create a cache from vectors that are at hand, all of which can be stored.

    Args:
        path: a directory that is empty or does not exist.
        captions: n texts; of equal captions the first counts.
        vectors: float32 [n, d].
        tokens: int32 [n], zeros by default.
        truncated: bool [n], False by default.

    Raises:
        BadCaption: a caption that cannot be used.
        VectorRejected: a vector that cannot be stored, by position.
        BadConfig: the directory holds something already.
        CacheFull: no room.
    """
    for caption in captions:
        normalise(caption)
    _, bad = encoding.encode(np.asarray(vectors, np.float32))
    if bad:
        row, reason = next(iter(bad.items()))
        raise VectorRejected(f"row {row}: {reason} ({len(bad)} such rows)")
    with BulkWriter(path, recipe, encoding, segment_rows=segment_rows) as writer:
        writer.add(captions, vectors, tokens, truncated)
        return writer.finish()
