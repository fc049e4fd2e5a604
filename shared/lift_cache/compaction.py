"""Merging small segments into larger ones, so that a cache of any age has few.

A cache keeps about sixteen segments and one more for every 64 GiB. Beyond that the smallest are merged, and
with them each next larger one that is no larger than those before it together: sizes then grow like those of a
binary counter, and a row is written again a number of times that grows with the logarithm of the cache only.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from pathlib import Path

import numpy as np

from lift_cache.encoding import Encoding
from lift_cache.index import merged_ranges
from lift_cache.recipe import Recipe
from lift_cache.segment import Segment, SegmentInfo, SegmentWriter, StoredRows, segment_bytes

SEGMENTS = 16
LARGE_BYTES = 64 << 30
"""A segment of this size is left alone."""


def choose(
    segments: Sequence[SegmentInfo], with_captions: Container[str], *, everything: bool = False
) -> list[list[SegmentInfo]]:
    """Groups of segments to merge into one each; none when there are few enough.

    Args:
        with_captions: ids of those whose captions are here. The others cannot be merged with them into one file
            and its sibling, only with each other.
        everything: merge whatever may be merged, however few there are.
    """
    groups: list[list[SegmentInfo]] = []
    for captions in (True, False):
        small = sorted(
            (i for i in segments if i.size < LARGE_BYTES and (i.id in with_captions) == captions),
            key=lambda info: (info.size, info.id),
        )
        allowed = 1 if everything else SEGMENTS + sum(info.size for info in small) // LARGE_BYTES
        excess = len(small) - allowed
        while excess > 0 and len(small) > 1:
            group = [small.pop(0)]
            size = group[0].size
            while small and (excess > 0 or small[0].size <= size) and size + small[0].size <= LARGE_BYTES:
                size += small[0].size
                group.append(small.pop(0))
                excess -= 1
            if len(group) == 1:
                break
            groups.append(group)
    return groups


def merge_bytes(encoding: Encoding, group: Sequence[SegmentInfo]) -> int:
    """Estimate of what merging a group writes."""
    return sum(info.size + info.captions_size for info in group) + segment_bytes(encoding, 0)


def merge_segments(
    directory: Path,
    recipe: Recipe,
    encoding: Encoding,
    ids: Sequence[str],
    wanted: Callable[[np.ndarray], np.ndarray] | None = None,
    progress: Callable[[int], None] = lambda _: None,
    *,
    source: Path | None = None,
) -> SegmentInfo | None:
    """Write the rows of several segments as one, in bounded memory; of equal keys the first segment's.

    Args:
        directory: of segments, where the new one goes.
        wanted: keys uint8 [n, 16] → bool [n]; other rows are left out.
        progress: called with the rows that were read.
        source: directory of the segments that are read; the same by default.

    Returns:
        The new segment, or None where no row was wanted.

    Raises:
        CacheFull, CacheDamaged.
    """
    segments = [Segment(source or directory, segment_id) for segment_id in ids]
    captions = all(segment.has_captions for segment in segments)
    rows = 0
    with SegmentWriter(directory, recipe, encoding, captions=captions) as writer:
        for part in merged_ranges(segments, progress):
            location = part.location if wanted is None else part.location[wanted(part.keys)]
            for start in range(0, len(location), GATHER_ROWS):
                chosen = location[start : start + GATHER_ROWS]
                rows += len(chosen)
                writer.add(_gather(segments, chosen, captions))
        return writer.finish() if rows else None


GATHER_ROWS = 8_192


def _gather(segments: Sequence[Segment], location: np.ndarray, captions: bool) -> StoredRows:
    """Rows at the given locations, in their order, every checksum verified."""
    number = (location >> np.uint64(32)).astype(np.int64)
    row = (location & np.uint64(0xFFFFFFFF)).astype(np.int64)
    parts, order = [], []
    for s in np.unique(number).tolist():
        here = np.flatnonzero(number == s)
        parts.append(segments[s].take(row[here], captions=captions))
        order.append(here)
    if len(parts) == 1:
        return parts[0]
    return StoredRows.concatenate(parts).take(np.argsort(np.concatenate(order)))
