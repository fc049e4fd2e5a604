"""Writing a whole cache at once, without a live tier: sealed segments and a snapshot over them.

Needs no LMDB, so it works wherever Arrow does: for imports, for text controls, and in tests.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from lift_cache import files
from lift_cache.encoding import Encoding
from lift_cache.errors import VectorRejected
from lift_cache.keys import KEY_BYTES, key_of_normalised, normalise
from lift_cache.lock import WriterLock
from lift_cache.recipe import Recipe
from lift_cache.segment import StoredRows, row_checksums, write_segment
from lift_cache.snapshot import Snapshot, build_snapshot


def write_cache(
    path: str | os.PathLike[str],
    recipe: Recipe,
    encoding: Encoding,
    captions: Sequence[str],
    vectors: np.ndarray,
    tokens: np.ndarray | None = None,
    truncated: np.ndarray | None = None,
    *,
    segment_rows: int = 65_536,
) -> Snapshot:
    """Create a cache from vectors that are at hand.

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
    path = Path(path)
    n = len(captions)
    texts = [normalise(caption) for caption in captions]
    stored, bad = encoding.encode(np.asarray(vectors, np.float32))
    if bad:
        row, reason = next(iter(bad.items()))
        raise VectorRejected(f"row {row}: {reason} ({len(bad)} such rows)")
    files.refuse_other_content(path)
    files.make_directory(path)
    lock = WriterLock(path)
    try:
        files.refuse_other_content(path)
        keys = np.frombuffer(b"".join(map(key_of_normalised, texts)), np.uint8).reshape(n, KEY_BYTES)
        _, first = np.unique(keys, axis=0, return_index=True)
        rows = StoredRows(
            keys,
            stored,
            np.zeros(n, np.int32) if tokens is None else np.asarray(tokens, np.int32),
            np.zeros(n, bool) if truncated is None else np.asarray(truncated, bool),
            row_checksums(keys, stored),
            pa.array(texts, pa.large_string()),
        )
        encoding.save(path / "encoding.json")
        recipe.save(path / "recipe.json")
        files.make_directory(path / "segments")
        infos = [
            write_segment(path / "segments", recipe, encoding, rows.take(first[start : start + segment_rows]))
            for start in range(0, len(first), segment_rows)
        ]
        return build_snapshot(path, recipe, encoding, infos)
    finally:
        lock.release()
