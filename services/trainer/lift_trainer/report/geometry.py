"""How the text vectors of a run lie, as they are stored and after its text transform.

Vectors of a language model lie in a narrow cone: any two captions have a high cosine, and a few directions hold most of
the variance. What the transform changes about that is measured on one fixed sample of the training captions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lift_cache.errors import CacheNotFound, LiftError
from lift_cache.keys import sort_order
from lift_cache.reader import CacheReader
from lift_trainer.checkpoint import transform_file
from lift_trainer.config import TrainConfig
from lift_trainer.rejects import Rejects
from lift_trainer.report.runs import Run
from lift_trainer.samples import build_index
from lift_trainer.transform import TextTransform

SAMPLE = 2048
"""Captions that are looked at, at most: those with the smallest keys, which is a random sample, and a fixed one."""

LEADING = (1, 10)
"""First eigenvectors whose share of the variance is told."""


@dataclass(frozen=True)
class Lie:
    dimensions: int
    cosine: float
    """Mean over all pairs of different captions."""
    leading: tuple[float, ...]
    """Share of the variance in the first `LEADING` eigenvectors of the covariance."""
    effective_rank: float
    """exp of the entropy of the eigenvalues' shares (Roy & Vetterli 2007)."""


@dataclass(frozen=True)
class Geometry:
    encoder: str
    captions: int
    of_training: bool
    """False: the training data are not at hand, so the sample is of all captions in the cache."""
    stored: Lie
    transformed: tuple[tuple[str, tuple[str, ...], Lie], ...]
    """Transforms but `none`, the names of the runs that have them, and how vectors lie after them."""


def lie(x_nd: np.ndarray) -> Lie:
    """Of vectors [n, D], n ≥ 2, of any length but zero."""
    x = x_nd.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    n = len(x)
    cosine = (np.square(x.sum(0)).sum() - n) / (n * (n - 1))
    values = np.square(np.linalg.svd(x - x.mean(0), compute_uv=False))
    total = values.sum()
    if total <= 0:
        return Lie(x.shape[1], float(cosine), tuple(1.0 for _ in LEADING), 1.0)
    shares = values / total
    some = shares[shares > 0]
    return Lie(
        x.shape[1],
        float(cosine),
        tuple(float(shares[:k].sum()) for k in LEADING),
        float(np.exp(-(some * np.log(some)).sum())),
    )


def geometries(runs: Sequence[Run], caches: Mapping[str, Path]) -> list[Geometry]:
    """One for each snapshot and data; where the snapshot is not at hand there is none.

    Args:
        caches: where each run's cache lies, by the run's name; none for runs without.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        if run.name in caches and run.state.snapshot is not None:
            alike.setdefault(repr((run.state.snapshot, run.settings.get("data"))), []).append(run)
    found = []
    for some in alike.values():
        with contextlib.suppress(LiftError):
            found.append(_geometry(some, caches[some[0].name]))
    return found


def _geometry(runs: Sequence[Run], cache: Path) -> Geometry:
    """Of runs on one snapshot and data. Raises LiftError."""
    run = runs[0]
    reader = CacheReader(f"{cache}@{run.state.snapshot}")
    rows, of_training = _sample(run, reader)
    if len(rows) < 2:
        raise CacheNotFound(f"{cache} has fewer than two captions of {run.path}")
    stored = torch.from_numpy(np.ascontiguousarray(reader.encoding.decode(reader.gather(rows))))
    by_transform: dict[str, list[Run]] = {}
    for each in runs:
        if each.config.text_transform != "none":
            by_transform.setdefault(each.config.text_transform, []).append(each)
    transformed = (
        (spec, some, TextTransform.load(some[0].checkpoint / transform_file(0)))
        for spec, some in by_transform.items()
    )
    return Geometry(
        encoder=reader.recipe.model,
        captions=len(rows),
        of_training=of_training,
        stored=lie(stored.numpy()),
        transformed=tuple(
            (spec, tuple(run.name for run in some), lie(transform(stored).numpy()))
            for spec, some, transform in transformed
        ),
    )


def _sample(run: Run, reader: CacheReader) -> tuple[np.ndarray, bool]:
    """Rows, int64 [≤ SAMPLE], and whether they are of training captions."""
    with contextlib.suppress(LiftError, ValueError):
        config = TrainConfig.model_validate(run.settings)
        index = build_index(
            config.data,
            Rejects(config.max_bad),
            caption_fields=config.caption_field,
            images=config.images,
            image_field=config.image_field,
        )
        found = reader.lookup(index.keys[sort_order(index.keys)])
        return found[found >= 0][:SAMPLE], True
    return np.unique(np.linspace(0, reader.rows - 1, min(SAMPLE, reader.rows)).astype(np.int64)), False
