"""`lift-cache lookup`: is a caption in a cache, what is known of it, and which cached captions are nearest.

Reads a snapshot and computes nothing with a model. Vectors of language models lie in a narrow cone, where any
two captions have a cosine near one; so neighbours are ranked after the cache's mean was taken off.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lift_cache.errors import BadConfig
from lift_cache.keys import caption_key, normalise
from lift_cache.reader import CacheReader
from lift_cache.segment import captions_path
from lift_cache.tools.common import AsJson, Location, progress
from lift_cache.tools.printable import printable

BLOCK_VALUES = 1 << 23
"""Values of the vectors that are in memory at a time, as float32: 32 MiB."""

MEAN_ROWS = 1 << 14
"""Rows that the mean is taken over: the first of the index, which keys being hashes makes a random sample."""

MISSING = 1
"""Exit status when a caption is not there."""


def mean_direction(reader: CacheReader) -> np.ndarray:
    """Mean of the unit vectors of a fixed sample of at most `MEAN_ROWS` captions: float32 [d]."""
    total = np.zeros(reader.dimensions)
    rows = np.arange(min(MEAN_ROWS, reader.rows))
    for start in range(0, len(rows), _block(reader)):
        vectors = reader.encoding.decode(reader.gather(rows[start : start + _block(reader)]))
        total += _unit(vectors).sum(0, dtype=np.float64)
    return (total / max(len(rows), 1)).astype(np.float32)


def nearest(
    reader: CacheReader,
    vector: np.ndarray,
    k: int,
    *,
    mean: np.ndarray | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[tuple[int, float]]:
    """The cached captions whose vectors are nearest: every row is read, in bounded memory.

    Args:
        vector: float32 [d], of any length but zero.
        k: how many.
        mean: float32 [d], as `mean_direction` gives it; taken off every unit vector, `vector` among them, before
            cosines are taken.
        progress: called with the number of rows just read.

    Returns:
        At most k pairs (row, cosine), the nearest first, of equal cosines the lower row.

    Raises:
        CacheDamaged: a row fails its checksum.
    """
    wanted = _directions(np.asarray(vector, np.float32)[None], mean)[0]
    keys, cosines = np.empty((0, 16), np.uint8), np.empty(0, np.float32)
    for block in reader.iter_rows(_block(reader)):
        found = _directions(reader.encoding.decode(block.vectors), mean) @ wanted
        keys, cosines = np.concatenate([keys, block.keys]), np.concatenate([cosines, found])
        if len(cosines) > k:
            best = np.argpartition(-cosines, k - 1)[:k]
            keys, cosines = keys[best], cosines[best]
        progress(len(found))
    rows = reader.lookup(keys)
    order = np.lexsort((rows, -cosines))
    return list(zip(rows[order].tolist(), cosines[order].tolist(), strict=True))


def _block(reader: CacheReader) -> int:
    return max(1, BLOCK_VALUES // reader.dimensions)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length one; a zero row stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def _directions(vectors: np.ndarray, mean: np.ndarray | None) -> np.ndarray:
    return _unit(vectors) if mean is None else _unit(_unit(vectors) - mean)


@dataclass(frozen=True)
class Neighbour:
    """A cached caption near another: None instead of its text in a copy without captions."""

    caption: str | None
    key: str
    centred: float
    cosine: float


@dataclass(frozen=True)
class Found:
    """What a cache holds for a caption; everything after `row` is None where it holds nothing."""

    caption: str
    key: str
    row: int | None = None
    tokens: int | None = None
    truncated: bool | None = None
    norm: float | None = None
    neighbours: list[Neighbour] | None = None


def look_up(reader: CacheReader, caption: str, k: int = 0, mean: np.ndarray | None = None) -> Found:
    """Look for one caption, and for its k nearest with `mean` taken off.

    Raises:
        BadCaption: not a caption at all.
        CacheDamaged: bytes that are not those that were written.
    """
    text = normalise(caption)
    key = np.frombuffer(caption_key(text), np.uint8)[None]
    rows = reader.lookup(key)
    if rows[0] < 0:
        return Found(text, key.tobytes().hex())
    vector = reader.encoding.decode(reader.gather(rows, check=True))[0]
    neighbours = None
    if k:
        with progress(reader.rows, "comparing") as advance:
            near = nearest(reader, vector, k + 1, mean=mean, progress=advance)
        neighbours = _named(reader, vector, [pair for pair in near if pair[0] != rows[0]][:k])
    return Found(
        text,
        key.tobytes().hex(),
        int(rows[0]),
        int(reader.tokens(rows)[0]),
        bool(reader.truncated(rows)[0]),
        float(np.linalg.norm(vector)),
        neighbours,
    )


def _named(reader: CacheReader, vector: np.ndarray, near: list[tuple[int, float]]) -> list[Neighbour]:
    rows = np.array([row for row, _ in near], np.int64)
    cosines = _unit(reader.encoding.decode(reader.gather(rows))) @ _unit(vector[None])[0]
    captions = reader.captions(rows) if has_captions(reader) else [None] * len(rows)
    keys = [key.tobytes().hex() for key in reader.keys(rows)]
    centred = [cosine for _, cosine in near]
    return [Neighbour(*values) for values in zip(captions, keys, centred, map(float, cosines), strict=True)]


def has_captions(reader: CacheReader) -> bool:
    """Whether the captions' texts are here; a copy may have been made without them."""
    segments = reader.path / "segments"
    return all(captions_path(segments, info.id).is_file() for info in reader.manifest.segments)


# ---------------------------------------------------------------------------------------------- command


def lookup(
    cache: Location,
    *captions: Annotated[str, Parameter(help="Texts to look for, each one argument.")],
    neighbours: Annotated[int, Parameter(help="Nearest cached captions to show; 0 reads no other row.")] = 10,
    as_json: AsJson = False,
) -> int:
    """Say whether captions are in a cache's snapshot, and which cached captions are nearest to them.

    Exit status 1 when one is missing. Neighbours are ranked by the cosine after the cache's mean was taken off
    (`centred`); with a language model's vectors the plain cosine is near 1 for any two captions.

    Examples: `lift-cache lookup caches/mine 'a dog runs'`, `lift-cache lookup caches/mine@000002-… 'a dog' 'a cat'
    --neighbours 0`
    """
    if not captions:
        raise BadConfig("name at least one caption, in quotes")
    if neighbours < 0:
        raise BadConfig(f"--neighbours {neighbours}: 0 or more")
    reader = CacheReader(cache)
    mean = mean_direction(reader) if neighbours else None
    answers = [look_up(reader, caption, neighbours, mean) for caption in captions]
    if as_json:
        about = {"cache": str(reader.path), "snapshot": reader.snapshot_id, "rows": reader.rows}
        print(json.dumps(about | {"captions": [_as_dict(answer) for answer in answers]}))
    else:
        console = Console()
        for asked, answer in zip(captions, answers, strict=True):
            _show(console, reader, asked, answer)
    return MISSING if any(answer.row is None for answer in answers) else 0


def _as_dict(answer: Found) -> dict[str, Any]:
    return {"found": answer.row is not None} | asdict(answer)


def _show(console: Console, reader: CacheReader, asked: str, answer: Found) -> None:
    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    line(printable(answer.caption) + ("" if asked == answer.caption else "   (normalised)"))
    line(f"  key {answer.key}")
    if answer.row is None:
        line(f"  not in snapshot {reader.snapshot_id}, which has {reader.rows:,} captions")
        serve = shlex.join(
            ["lift-embed", "serve", "--cache", str(reader.path), "--model", reader.recipe.model]
        )
        line(f"  if it was filled since: `{shlex.join(['lift-cache', 'snapshot', str(reader.path)])}`")
        line(
            f"  to embed it: `{serve}`, then `lift-embed fill new.txt --snapshot` with it on a line of new.txt"
        )
        return
    cut = ", truncated" if answer.truncated else ""
    line(f"  row {answer.row:,}: {answer.tokens:,} tokens{cut}, norm {answer.norm:.4f}")
    if not answer.neighbours:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    for name in ("centred", "cosine"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(
        "nearest" if answer.neighbours[0].caption is not None else "nearest (keys)", overflow="fold"
    )
    for near in answer.neighbours:
        shown = near.key if near.caption is None else printable(near.caption)
        table.add_row(f"{near.centred:.3f}", f"{near.cosine:.3f}", Text(shown))
    console.print(table)
