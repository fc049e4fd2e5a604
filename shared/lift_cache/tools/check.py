"""`verify`: every byte of a cache, and, on request, a sample of its vectors against an engine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import Parameter
from rich.console import Console

from lift_cache.client import EmbeddingClient
from lift_cache.errors import BadConfig
from lift_cache.provenance import note_provenance
from lift_cache.reader import CacheReader
from lift_cache.recipe import MOST_DRIFT
from lift_cache.tools.common import AsJson, CachePath
from lift_cache.verify import verify as verify_cache

BATCH = 64


@dataclass(frozen=True)
class Sample:
    """Captions embedded again: how many, their cosines with what is stored, and the bound they must keep.

    Attributes:
        token_counts_equal: every caption had as many tokens as before.
        most_drift: 1 − cosine that two honest engines may differ by, for the recipe's compute dtype.
    """

    rows: int
    min_cosine: float
    mean_cosine: float
    token_counts_equal: bool
    most_drift: float

    @property
    def agrees(self) -> bool:
        return self.token_counts_equal and 1 - self.min_cosine <= self.most_drift


def embed_again(reader: CacheReader, client: EmbeddingClient, rows: int) -> Sample:
    """Have an engine embed captions that are drawn evenly from a snapshot, and compare.

    Args:
        client: of a server with the same recipe and a cache of its own, in which these captions are not.
        rows: how many captions.

    Raises:
        RecipeMismatch: the server's recipe is another.
        BadConfig: the server answered from its cache, which proves nothing.
        CacheDamaged: this copy has no captions.
        ServerUnavailable, BadCaption.
    """
    info = client.info()
    reader.recipe.model_copy(update={"declared": False}).require_same(
        info.recipe.model_copy(update={"declared": False}), here=str(reader.path), there=client.url
    )
    chosen = np.unique(np.linspace(0, reader.rows - 1, min(rows, reader.rows)).astype(np.int64))
    cosines, tokens_equal = [], True
    for start in range(0, len(chosen), BATCH):
        batch = chosen[start : start + BATCH]
        stored = reader.encoding.decode(reader.gather(batch, check=True))
        answer = client.embed(reader.captions(batch))
        if answer.cached.any():
            raise BadConfig(
                f"{client.url} answered from its cache; start a server on a new one (`lift-embed serve --cache "
                "EMPTY …`), so that an engine computes the sample"
            )
        # Through the same encoding, so that only the engine is compared; a row it refuses keeps its values.
        encoded, refused = reader.encoding.encode(answer.vectors)
        again = reader.encoding.decode(encoded)
        for row in refused:
            again[row] = answer.vectors[row, : again.shape[1]]
        cosines.append(_cosines(stored, again))
        tokens_equal = tokens_equal and np.array_equal(answer.tokens, reader.tokens(batch))
    every = np.concatenate(cosines) if cosines else np.ones(1)
    return Sample(
        len(chosen), float(every.min()), float(every.mean()), tokens_equal, MOST_DRIFT[reader.recipe.dtype]
    )


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)


def verify(
    cache: CachePath,
    *,
    sample: Annotated[
        int, Parameter(help="Embed this many captions again, through --server, and compare.")
    ] = 0,
    server: Annotated[
        str | None,
        Parameter(help="URL of an embedding server with the same recipe and a new cache of its own."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Read every byte: checksums, order, captions against keys, snapshots, the live tier.

    Exit status 1 when anything is wrong. A sample that agrees is noted beside the recipe, which is how a recipe
    that was only declared comes to be checked.

    Examples: `lift-cache verify CACHE`, `lift-cache verify CACHE --sample 200 --server http://localhost:8000`
    """
    if sample < 0 or (sample > 0) != (server is not None):
        raise BadConfig("--sample N and --server URL go together; N is at least 1")
    console = Console(stderr=True)
    with console.status("reading") as status:
        report = verify_cache(cache, lambda what: status.update(f"reading {what}"))
        compared = None
        if server is not None and not report.problems:
            status.update(f"embedding {sample} captions again")
            reader = CacheReader(cache)
            with EmbeddingClient(server) as client:
                compared = embed_again(reader, client, sample)
            if compared.agrees:
                _note(cache, reader, compared)
            else:
                report.problems.append(
                    f"{server} gives other vectors for this recipe: lowest cosine {compared.min_cosine:.6f}, "
                    f"{1 - compared.most_drift:.6f} at least is needed"
                    + ("" if compared.token_counts_equal else "; token counts differ")
                )
    if as_json:
        print(json.dumps({**asdict(report), "sample": asdict(compared) if compared else None}, indent=2))
        return 1 if report.problems else 0
    for problem in report.problems:
        print(f"damaged: {problem}" if compared is None else f"wrong: {problem}")
    if compared is not None:
        print(
            f"{compared.rows:,} captions embedded again: cosine at least {compared.min_cosine:.6f}, "
            f"{compared.mean_cosine:.6f} on average"
        )
    verdict = f"{len(report.problems)} problems" if report.problems else "all good"
    print(
        f"{report.segments:,} segments, {report.rows:,} rows, {report.snapshots:,} snapshots; "
        f"live: {report.live}; {verdict}"
    )
    if report.problems and compared is None:
        print(f"`lift-cache repair {cache}` puts aside what is damaged and lists what has to be filled again")
    return 1 if report.problems else 0


def _note(cache: Path, reader: CacheReader, sample: Sample) -> None:
    said = {"sample": sample.rows, "min_cosine": round(sample.min_cosine, 8)}
    note_provenance(cache, {"verified": {"snapshot": reader.snapshot_id, **said}})
