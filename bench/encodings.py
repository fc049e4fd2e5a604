"""What does storing in fewer bits, or fewer dimensions, do to the vectors of a real language model?

    lift-embed model smollm2
    lift-data emoji data/emoji
    lift-embed serve --cache runs/encodings/cache --model smollm2 --store float32 &
    lift-embed fill data/emoji/*.tar --snapshot
    python bench/encodings.py --cache runs/encodings/cache --out bench/results/encodings.json

For each encoding: bytes per vector, maximum error, mean cosine, and recall@10 overlap, raw, centred and
whitened (k as large as is sound), between the vectors and their stored form, over all captions of the cache.

- int8 takes the range of all vectors, as `lift-cache convert` does, and wider ones, as a cache needs that is
  still to be filled: `refused` is the share of the other captions that it could not hold, had the range been
  that of 1,000 captions and as much wider (mean of 8 draws).
- The negative control is int8 with one scale for each vector, the usual way. It keeps the cosine; it should
  lose the neighbours once they are whitened, or the measure sees nothing.
- Cuts keep the first dimensions. SmolLM2 was not trained for that; a Matryoshka model should do better.

Takes about a minute on one core.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import App

from lift_cache.encoding import HEADROOM, Encoding
from lift_cache.errors import BadConfig, LiftError
from lift_cache.files import write_atomic
from lift_cache.reader import CacheReader
from lift_cache.segment import row_bytes
from lift_cache.tools.overlap import VIEWS, agreement, fit_views

SAMPLE = 1_000
HEADROOMS = (0.0, 0.25, 0.5, 1.0)
DRAWS = 8

app = App(help=__doc__, help_format="plaintext")


@app.default
def main(
    *, cache: str, out: Path = Path("runs/encodings.json"), cuts: tuple[int, ...] = (512, 384, 288, 144)
) -> None:
    """Compare encodings on the vectors of a float32 cache; see the head of the file.

    Parameters
    ----------
    cache
        A cache that stores float32, with at least 2,000 captions.
    out
        Where the figures go; a table is printed, too.
    cuts
        Dimensions to keep.
    """
    reader = CacheReader(cache)
    if reader.encoding.dtype != "float32" or reader.rows < 2 * SAMPLE:
        raise BadConfig(
            f"{cache} needs float32 vectors of at least {2 * SAMPLE:,} captions (serve --store float32)"
        )
    x = reader.gather(np.arange(reader.rows), check=True)
    d = reader.dimensions
    resolution = reader.encoding.resolution()
    views = fit_views([x], resolution)
    results: dict[str, dict[str, Any]] = {}

    def note(name: str, bytes_per_vector: int, after: np.ndarray, refused: float | None = None) -> None:
        kept_views = views if after.shape[1] == d else fit_views([x[:, : after.shape[1]]], resolution)
        found = agreement(x, after, views, kept_views)
        results[name] = {"bytes_per_vector": bytes_per_vector, **asdict(found)}
        if refused is not None:
            results[name]["refused"] = refused
        print(line(name, results[name]), flush=True)

    def encoded(name: str, encoding: Encoding, refused: float | None = None) -> None:
        note(name, row_bytes(encoding), encoding.decode(encoding.encode(x)[0]), refused)

    print(f"{'':34}{'bytes':>6}{'max error':>11}{'cosine':>10}" + "".join(f"{view:>10}" for view in VIEWS))
    for dtype in ("float32", "float16"):
        encoded(dtype, Encoding(dtype=dtype, dimensions=d))
    low, high = x.min(0), x.max(0)
    for headroom in HEADROOMS:
        more = headroom * (high - low) / 2
        refused = float(np.mean([refused_share(x, headroom, seed) for seed in range(DRAWS)]))
        encoded(f"int8, range × {1 + headroom:g}", Encoding.int8_of_range(low - more, high + more), refused)
    scale = np.abs(x).max(1, keepdims=True) / 127
    note("int8, one scale for each vector", d + 4, np.rint(x / scale) * scale)
    for kept in cuts:
        encoded(f"float32, first {kept}", Encoding(dtype="float32", dimensions=kept))

    spread = np.sort(np.abs(x).mean(0))
    facts = {
        "cache": {
            "model": reader.recipe.model,
            "pooling": reader.recipe.pooling,
            "compute": reader.recipe.dtype,
        },
        "captions": reader.rows,
        "dimensions": d,
        "k": views.k,
        "mean_cosine_between_captions": float(
            ((x / np.linalg.norm(x, axis=1, keepdims=True)).mean(0) ** 2).sum()
        ),
        "largest_dimensions_over_median": [round(float(v / np.median(spread)), 1) for v in spread[:-6:-1]],
        "sample": SAMPLE,
        "headroom": HEADROOM,
        "encodings": results,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, (json.dumps(facts, indent=1) + "\n").encode())
    print(f"\n{reader.rows:,} captions, {d} dimensions, whitened to {views.k}; written to {out}")


def refused_share(x: np.ndarray, headroom: float, seed: int) -> float:
    """Share of vectors outside a sample that int8 fitted to the sample cannot hold."""
    order = np.random.default_rng(seed).permutation(len(x))
    encoding = Encoding.fit_int8(x[order[:SAMPLE]], headroom=headroom)
    return len(encoding.encode(x[order[SAMPLE:]])[1]) / (len(x) - SAMPLE)


def line(name: str, row: dict[str, Any]) -> str:
    overlaps = "".join(f"{row[view]:>10.4f}" for view in VIEWS)
    refused = f"   refused {row['refused']:.2%}" if "refused" in row else ""
    cells = f"{row['bytes_per_vector']:>6}{row['max_error']:>11.2g}{row['mean_cosine']:>10.6f}{overlaps}"
    return f"{name:<34}{cells}{refused}"


if __name__ == "__main__":
    try:
        app()
    except LiftError as error:
        sys.exit(f"error: {error}")
