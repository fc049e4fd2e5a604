"""Canary captions: does an engine still make the vectors that this cache was filled with?

Versions, devices and kernels are not part of a recipe, because most of them change nothing that matters. The
canaries decide: pairs of a caption and its swapped twin, embedded when the cache was created and again at
every engine start. Token ids must be equal, vectors close, and the drift far below the distance between twins.
A cache that has rows and has lost its canaries is checked by some of the captions that it holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from lift_cache.errors import BadCaption, CacheDamaged
from lift_cache.files import write_atomic
from lift_cache.keys import caption_keys
from lift_cache.recipe import MOST_DRIFT, Recipe
from lift_cache.segment import Segment, segment_ids
from lift_cache.writer import CacheWriter
from lift_embedder.engines import Engine
from lift_embedder.tokens import CaptionTokenizer

log = logging.getLogger(__name__)

PAIRS = (
    ("a red circle above a blue square", "a blue circle above a red square"),
    ("a dog chasing a cat", "a cat chasing a dog"),
    ("a man riding a horse", "a horse riding a man"),
    ("two small boats left of a large ship", "two large boats left of a small ship"),
    (
        "an old woman in a white coat holding a black umbrella",
        "an old woman in a black coat holding a white umbrella",
    ),
    ("🍎 on a table under a lamp", "🍎 under a table on a lamp"),
)
CAPTIONS = tuple(caption for pair in PAIRS for caption in pair)

TWIN_SHARE = 0.25
"""Drift must stay below this share of the distance between twins (the median pair's), or word order would
drown in it. Not each pair's own: SmolLM2 tells the closest pair apart by 1e-3, hardly above bfloat16's noise."""

SAMPLE = 16
"""Stored captions that stand in for lost canaries."""


class Canaries(BaseModel):
    """`canaries.json`, beside the cache's recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    fingerprint: str
    captions: list[str]
    token_ids: list[list[int]]
    vectors: list[list[float]]
    engine: dict[str, str]

    @classmethod
    async def measure(
        cls, engine: Engine, tokenizer: CaptionTokenizer, captions: Sequence[str] = CAPTIONS
    ) -> Canaries:
        """Embed the canaries now. Raises EngineUnavailable."""
        ids = [tokens.ids for tokens in tokenizer(captions)]
        vectors = await engine.embed(ids)
        return cls(
            fingerprint=tokenizer.recipe.fingerprint,
            captions=list(captions),
            token_ids=ids,
            vectors=vectors.tolist(),
            engine=engine.describe(),
        )

    def allowed_drift(self, dtype: str) -> float:
        """Largest 1 − cosine that may lie between the engine behind these canaries and another one."""
        unit_nd = _unit(self.vectors)
        twins = float(np.median(1 - (unit_nd[0::2] * unit_nd[1::2]).sum(1)))
        if twins > MOST_DRIFT["float32"]:  # otherwise the model does not see word order at all
            return min(MOST_DRIFT[dtype], TWIN_SHARE * twins)
        return MOST_DRIFT[dtype]

    def disagreement(self, now: Canaries, recipe: Recipe) -> str | None:
        """Why the engine behind `now` must not add to a cache filled by the engine behind `self`, if so."""
        if now.token_ids != self.token_ids:
            which = next(
                c for c, a, b in zip(self.captions, self.token_ids, now.token_ids, strict=True) if a != b
            )
            return f"the tokenizer gives other token ids than when the cache was made (canary {which!r})"
        then_nd, now_nd = _unit(self.vectors), _unit(now.vectors)
        if then_nd.shape != now_nd.shape or not np.isfinite(now_nd).all():
            return "the engine gives canary vectors that are not finite or of another length"
        drift_n = 1 - (then_nd * now_nd).sum(1)
        if not recipe.normalize:  # then a vector's length is part of it, which a cosine does not see
            then_n, now_n = (np.linalg.norm(np.array(c.vectors, np.float64), axis=1) for c in (self, now))
            drift_n += (now_n / then_n - 1) ** 2 / 2
        allowed = self.allowed_drift(recipe.dtype)
        worst = int(drift_n.argmax())
        if drift_n[worst] <= allowed:
            return None
        return (
            f"the engine no longer agrees with the cache: canary {self.captions[worst]!r} moved by "
            f"{drift_n[worst]:.2g} (1 - cosine; at most {allowed:.2g} in {recipe.dtype}); "
            f"then {_versions(self.engine)}, now {_versions(now.engine)}"
        )

    def save(self, path: Path) -> None:
        """Write durably. Raises CacheFull."""
        write_atomic(path, self.model_dump_json().encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> Canaries | None:
        """None when the cache has no canaries yet. Raises CacheDamaged."""
        try:
            found = cls.model_validate(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, ValidationError):
            raise CacheDamaged(f"{path} is not readable; restore it from a copy of the cache") from None
        return found


async def check(cache: CacheWriter, engine: Engine, tokenizer: CaptionTokenizer) -> str | None:
    """Compare an engine that has just started with the cache; in an empty one it sets the standard.

    Returns:
        The reason to serve the cache read-only, or None.

    Raises:
        EngineUnavailable, CacheDamaged, CacheFull.
    """
    path = cache.path / "canaries.json"
    then = Canaries.load(path)
    if then is not None and then.fingerprint != cache.recipe.fingerprint:
        return f"{path} was made with another recipe than this cache; restore it from a copy of the cache"
    if then is None and not engine.verified and not cache.recipe.declared:
        return (
            "its recipe is verified and it has no canaries that could vouch for servers that run elsewhere; serve "
            "it once with --engine vllm or transformers, or let --engine openai make a cache of its own"
        )
    now = await Canaries.measure(engine, tokenizer, then.captions if then else CAPTIONS)
    if then is not None:
        return then.disagreement(now, tokenizer.recipe)
    if not np.isfinite(np.array(now.vectors)).all() or not np.array(now.vectors).any(1).all():
        return "the engine gives canary vectors that are zero or not finite"
    trouble = await _disagreement_with_rows(cache, engine, tokenizer, now) if cache.rows else None
    if trouble is None:
        now.save(path)
    return trouble


async def _disagreement_with_rows(
    cache: CacheWriter, engine: Engine, tokenizer: CaptionTokenizer, now: Canaries
) -> str | None:
    """Why an engine must not add to a cache whose canaries are lost, if some of its captions tell so."""
    captions = await asyncio.to_thread(_sealed_captions, cache.path / "segments")
    if not captions:
        log.warning(
            "the cache has rows, and neither canaries nor sealed captions that could tell whether this engine "
            "agrees with them; from now on its vectors are the standard",
            extra={"rows": cache.rows},
        )
        return None
    hits = await asyncio.to_thread(cache.get, caption_keys(captions))
    try:
        ids = [tokens.ids for tokens in tokenizer(captions)]
    except BadCaption as error:
        return f"the cache has no canaries, and a caption in it cannot be embedded again: {error}"
    embedded_nd = cache.encoding.decode(cache.encoding.encode(await engine.embed(ids))[0])
    drift_n = 1 - (_unit(hits.vectors) * _unit(embedded_nd)).sum(1)[hits.found]
    worst, allowed = float(drift_n.max(initial=0)), now.allowed_drift(tokenizer.recipe.dtype)
    if worst <= allowed:
        log.warning("canaries.json was missing; captions in the cache agree with this engine")
        return None
    return (
        f"the engine does not agree with the cache, whose canaries.json is missing: of {len(captions)} stored "
        f"captions one moved by {worst:.2g} (1 - cosine; at most {allowed:.2g}); now {_versions(now.engine)}"
    )


def _sealed_captions(directory: Path) -> list[str]:
    """At most `SAMPLE` captions, always the same ones, spread over the segments that have theirs."""
    found: list[str] = []
    ids = segment_ids(directory)
    for segment_id in ids:
        segment = Segment(directory, segment_id)
        rows = np.linspace(0, segment.rows - 1, min(segment.rows, -(-SAMPLE // len(ids)))).astype(np.int64)
        with contextlib.suppress(CacheDamaged):  # a copy without captions
            found += segment.captions(segment.keys(rows), rows)
    return found[:SAMPLE]


def _unit(vectors: list[list[float]] | np.ndarray) -> np.ndarray:
    array = np.array(vectors, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return array / np.linalg.norm(array, axis=1, keepdims=True)


def _versions(engine: dict[str, str]) -> str:
    return " ".join(f"{name} {value}" for name, value in engine.items() if name != "engine")
