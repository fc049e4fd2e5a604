"""`info`: the card of a cache. What made it, how it is stored, what is in it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lift_cache.encoding import Encoding
from lift_cache.errors import CacheDamaged, CacheLocked, CacheNotFound, LiftError
from lift_cache.index import merged_ranges
from lift_cache.lock import WriterLock
from lift_cache.provenance import provenance_of
from lift_cache.reader import CacheReader
from lift_cache.recipe import Recipe
from lift_cache.segment import Segment, segment_ids
from lift_cache.snapshot import load_manifest, snapshots_of
from lift_cache.tools.common import AsJson, CachePath, progress

MOST_TOKENS = 1 << 20
"""A longer caption counts as one of this length."""

SAMPLE_ROWS = 16_384
"""Rows whose vectors are looked at; drawn evenly from the whole snapshot."""


@dataclass(frozen=True)
class Content:
    """What a snapshot's rows are like.

    Attributes:
        rows: distinct captions; repeated: rows that a second segment holds too.
        tokens: over all rows; quantiles: tokens of a caption at 0, 10, 50, 90, 99 and 100 %.
        histogram: [tokens from, tokens below, captions].
        sampled: rows behind the next three. norms: smallest, mean and largest length.
        mean_cosine: of two different captions, the usual measure of anisotropy: 0 when directions are even.
        root: BLAKE2b-128 over key and checksum of every row in the order of keys. Two caches with the same
            rows have the same root, however their segments are cut.
    """

    rows: int
    repeated: int
    tokens: int
    truncated: int
    quantiles: list[int]
    histogram: list[tuple[int, int, int]]
    sampled: int
    norms: tuple[float, float, float]
    mean_cosine: float
    root: str


def describe(reader: CacheReader, advance: Callable[[int], None] = lambda _: None) -> Content:
    """Read tokens and checksums of every row, and the vectors of some. Raises CacheDamaged."""
    segments = [Segment(reader.path / "segments", info.id) for info in reader.manifest.segments]
    root = hashlib.blake2b(digest_size=16)
    counts = np.zeros(1, np.int64)
    for part in merged_ranges(segments, advance):
        checksums = np.zeros(len(part.keys), np.uint64)
        number = part.location >> np.uint64(32)
        row = (part.location & np.uint64(0xFFFFFFFF)).astype(np.int64)
        for s in np.unique(number).tolist():
            here = number == s
            checksums[here] = segments[s].column("checksum", row[here])
        both = np.concatenate([part.keys, checksums.view(np.uint8).reshape(-1, 8)], axis=1)
        root.update(both.tobytes())
        more = np.bincount(np.clip(part.tokens, 0, MOST_TOKENS))
        counts = np.pad(counts, (0, max(0, len(more) - len(counts))))
        counts[: len(more)] += more
    rows = np.unique(np.linspace(0, reader.rows - 1, min(reader.rows, SAMPLE_ROWS)).astype(np.int64))
    norms, cosine = _directions(reader, rows)
    return Content(
        rows=reader.rows,
        repeated=sum(segment.rows for segment in segments) - reader.rows,
        tokens=reader.manifest.tokens,
        truncated=reader.manifest.truncated,
        quantiles=[_quantile(counts, share) for share in (0, 0.1, 0.5, 0.9, 0.99, 1)],
        histogram=_histogram(counts),
        sampled=len(rows),
        norms=norms,
        mean_cosine=cosine,
        root=root.hexdigest(),
    )


def _directions(reader: CacheReader, rows: np.ndarray) -> tuple[tuple[float, float, float], float]:
    lengths, total = [], np.zeros(reader.dimensions)
    for start in range(0, len(rows), 1024):
        vectors = reader.encoding.decode(reader.gather(rows[start : start + 1024])).astype(np.float64)
        length = np.linalg.norm(vectors, axis=1)
        total += (vectors / np.maximum(length, 1e-30)[:, None]).sum(0)
        lengths.append(length)
    n = len(rows)
    if not n:
        return (0.0, 0.0, 0.0), 0.0
    all_lengths = np.concatenate(lengths)
    # The mean over all pairs of different rows, from the length of the sum of the directions.
    cosine = (float(total @ total) - n) / (n * (n - 1)) if n > 1 else 0.0
    return (float(all_lengths.min()), float(all_lengths.mean()), float(all_lengths.max())), cosine


def _quantile(counts: np.ndarray, share: float) -> int:
    below = np.cumsum(counts)
    return int(np.searchsorted(below, max(1, round(share * below[-1])))) if below[-1] else 0


def _histogram(counts: np.ndarray) -> list[tuple[int, int, int]]:
    edges = [0, 8, 16, 32, 48, 64, 77, 96, 128, 192, 256, 512, 1024, 4096, 1 << 31]
    bins = [(low, high, int(counts[low:high].sum())) for low, high in itertools.pairwise(edges)]
    return [one for one in bins if one[2]]


def card(cache: Path, advance: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """All that `info` says, as JSON has it.

    Raises:
        CacheNotFound, CacheDamaged, UnsupportedFormat.
    """
    if not (cache / "recipe.json").is_file():
        raise CacheNotFound(f"{cache} is not a cache (no recipe.json); check the path")
    recipe, encoding = Recipe.load(cache / "recipe.json"), Encoding.load(cache / "encoding.json")
    segments = [Segment(cache / "segments", name) for name in segment_ids(cache / "segments")]
    manifests, damaged = [], []
    for name in snapshots_of(cache):
        try:
            manifests.append((name, load_manifest(cache, name)))
        except CacheDamaged as error:
            damaged.append(str(error))
    return {
        "recipe": recipe.model_dump(mode="json"),
        "fingerprint": recipe.fingerprint,
        "encoding": encoding.card(),
        "provenance": provenance_of(cache),
        "segments": len(segments),
        "sealed_rows": sum(segment.rows for segment in segments),
        "sealed_bytes": sum(path.stat().st_size for path in (cache / "segments").glob("*.arrow")),
        "not_sealed": not_sealed(cache, recipe, encoding),
        "snapshots": [
            {
                "id": name,
                "rows": m.rows,
                "tokens": m.tokens,
                "truncated": m.truncated,
                "segments": len(m.segments),
                "provenance": m.provenance,
            }
            for name, m in manifests
        ],
        "damaged": damaged,
        "content": asdict(describe(CacheReader(f"{cache}@{manifests[-1][0]}"), advance))
        if manifests
        else None,
    }


def not_sealed(cache: Path, recipe: Recipe, encoding: Encoding) -> int | str:
    """Rows that only the live tier has, or why that cannot be said here."""
    if not (cache / "live").is_dir():
        return 0
    try:
        from lift_cache.live import LiveTier
    except ImportError:
        return "unknown: lmdb is not installed here"
    try:
        lock = WriterLock(cache)
    except CacheLocked:
        return "unknown: a writer is at work"
    except OSError as error:
        return f"unknown: {error.strerror}"
    try:
        live = LiveTier(cache / "live", recipe.fingerprint, encoding, readonly=True)
        try:
            return live.fresh_counts()[0]
        finally:
            live.close()
    except LiftError as error:
        return f"unknown: {error}"
    finally:
        lock.release()


def info(cache: CachePath, *, as_json: AsJson = False) -> None:
    """Say what made a cache, how it is stored and what is in it.

    Reads the tokens and checksums of every row of the newest snapshot, and the vectors of some thousands.
    """
    with progress(None, "rows") as advance:
        values = card(cache, advance)
    if as_json:
        print(json.dumps(values, indent=2))
        return
    _show(Console(), cache, values)


def _show(console: Console, cache: Path, values: dict[str, Any]) -> None:
    table = Table(title=str(cache), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")

    def rows(title: str, *pairs: tuple[str, object]) -> None:
        for i, (name, value) in enumerate(pairs):
            table.add_row("" if i else title, name, f"{value:,}" if isinstance(value, int) else str(value))

    rows("recipe", *values["recipe"].items(), ("fingerprint", values["fingerprint"]))
    rows("encoding", *values["encoding"].items())
    rows("made by", *((str(entry.get("engine", "")), json.dumps(entry)) for entry in values["provenance"]))
    rows(
        "stored",
        ("segments", f"{values['segments']:,} files; those that others took the place of count until `gc`"),
        ("rows in them", values["sealed_rows"]),
        ("bytes in them", values["sealed_bytes"]),
        ("not sealed", values["not_sealed"]),
    )
    for one in values["snapshots"]:
        rows("snapshot", (one["id"], f"{one['rows']:,} captions in {one['segments']} segments"))
    rows("damaged", *(("", said) for said in values["damaged"]))
    content = values["content"]
    if content is None:
        console.print(table)
        console.print(f"no snapshot yet: `lift-cache snapshot {cache}` makes one that trainers can read")
        return
    quantiles = " · ".join(
        f"{name} {value}"
        for name, value in zip(
            ("min", "10 %", "50 %", "90 %", "99 %", "max"), content["quantiles"], strict=True
        )
    )
    share = content["truncated"] / max(content["rows"], 1)
    rows(
        "content",
        ("captions", content["rows"]),
        ("repeated", f"{content['repeated']:,} rows that a second segment holds too"),
        ("tokens", f"{content['tokens']:,}; of a caption: {quantiles}"),
        ("truncated", f"{content['truncated']:,} ({share:.2%})"),
        ("norms", " … ".join(f"{norm:.4f}" for norm in content["norms"]) + " (min, mean, max)"),
        (
            "mean cosine",
            f"{content['mean_cosine']:.4f} between captions ({content['sampled']:,} looked at)",
        ),
        ("checksum root", content["root"]),
    )
    most = max(count for _, _, count in content["histogram"]) if content["histogram"] else 1
    for i, (low, high, count) in enumerate(content["histogram"]):
        name = f"{low}–{high - 1}" if high < 1 << 31 else f"{low} and more"
        table.add_row("" if i else "tokens", name, f"{'█' * max(1, round(30 * count / most))} {count:,}")
    console.print(table)
