"""Do captions keep their neighbours when their vectors are stored otherwise?

recall@10 overlap: of a caption's ten nearest captions before, the share that are among its ten nearest
after; by cosine, in three views of both:

    raw         the vectors
    centred     minus their mean
    whitened    projected on the leading k principal components, each divided by its standard deviation

Why three: raw cosines hang on the few dimensions in which a language model's vectors are large and much
alike. What tells captions apart lies in directions of small variance, which rounding spoils first and
whitening, as trainers use it, brings out: vectors can agree to four digits of cosine and have lost all that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

NEIGHBOURS = 10
LEAST_OVERLAP = 0.95
"""Below it a view is poor, and whoever converts is warned."""

CAPTIONS_PER_DIRECTION = 10
"""With fewer captions for each direction that is whitened, the directions are noise (so in the trainer)."""

EPSILON = 1e-6
VIEWS = ("raw", "centred", "whitened")
QUERIES = 512


@dataclass(frozen=True)
class Views:
    """What centres and whitens the vectors of one cache."""

    mean_d: np.ndarray
    """float32 [d]: mean of the unit vectors."""
    projection_dk: np.ndarray
    """float32 [d, k]; k is 0 where nothing can be whitened."""

    @property
    def k(self) -> int:
        return self.projection_dk.shape[1]

    def __call__(self, view: str, x_nd: np.ndarray) -> np.ndarray:
        """Vectors [n, d] as one of `VIEWS` sees them: unit vectors, float32 [n, d or k]."""
        x = _unit(x_nd)
        if view != "raw":
            x = x - self.mean_d
        if view == "whitened":
            x = x @ self.projection_dk
        return _unit(x)


@dataclass(frozen=True)
class Agreement:
    """How vectors agree with what they were before; None where there are too few captions to say.

    rows: captions compared · max_error: the largest difference in any value that is kept · mean_cosine:
    over all values, those that are not kept counting as zero · k: directions whitened, before and after ·
    raw, centred, whitened: recall@10 overlap.
    """

    rows: int
    max_error: float
    mean_cosine: float
    k: tuple[int, int]
    raw: float | None
    centred: float | None
    whitened: float | None

    @property
    def poor(self) -> list[str]:
        """The views that fall below `LEAST_OVERLAP`."""
        found = {view: getattr(self, view) for view in VIEWS}
        return [view for view, share in found.items() if share is not None and share < LEAST_OVERLAP]


def fit_views(blocks: Iterable[np.ndarray], resolution: float) -> Views:
    """Mean and principal components of unit vectors, in one pass and float64.

    k is as large as is sound: a tenth of the captions, and no direction whose variance is that of rounding.

    Args:
        blocks: float32 [m, d] at a time, n rows in all, at least one.
        resolution: `Encoding.resolution` of the stored vectors.
    """
    n, first, total, products = 0, np.zeros(0), np.zeros(0), np.zeros(0)
    for block in blocks:
        x = _unit(block).astype(np.float64)
        if not n:
            # Near the mean already, so that no digits are lost when the rest of it is taken off below.
            first = x.mean(0)
            total, products = np.zeros_like(first), np.zeros((len(first), len(first)))
        x -= first
        n += len(x)
        total += x.sum(0)
        products += x.T @ x
    shift = total / n
    values, vectors = np.linalg.eigh(products / n - np.outer(shift, shift))
    values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
    d = len(values)
    noise = max(resolution**2 / d, values[0] * d * np.finfo(np.float64).eps)
    k = min(int((values > noise).sum()), n // CAPTIONS_PER_DIRECTION)
    projection = np.asarray(vectors[:, :k] / np.sqrt(values[:k] + EPSILON * values.mean()), np.float32)
    return Views((first + shift).astype(np.float32), projection)


def agreement(
    before: np.ndarray,
    after: np.ndarray,
    views: Views,
    kept_views: Views,
    done: Callable[[int], None] = lambda rows: None,
) -> Agreement:
    """Compare vectors with their stored form.

    Args:
        before: float32 [n, d], n at least 1.
        after: float32 [n, kept], kept at most d.
        views: fitted to vectors such as `before`.
        kept_views: fitted to the first `kept` values of such vectors; the same object when all are kept.
        done: told the number of rows, for each view, that have been compared.
    """
    kept = after.shape[1]
    error = cosine = 0.0
    for start in range(0, len(before), QUERIES):
        a, b = (x[start : start + QUERIES].astype(np.float64) for x in (before, after))
        error = max(error, float(np.abs(a[:, :kept] - b).max()))
        cosine += float((_unit(a)[:, :kept] * _unit(b)).sum())
    overlaps: dict[str, float | None] = dict.fromkeys(VIEWS)
    for view in VIEWS if len(before) > 2 * NEIGHBOURS else ():
        if view != "whitened" or min(views.k, kept_views.k):
            overlaps[view] = overlap(views(view, before), kept_views(view, after), done)
    return Agreement(
        rows=len(before),
        max_error=error,
        mean_cosine=cosine / len(before),
        k=(views.k, kept_views.k),
        **overlaps,
    )


def overlap(before: np.ndarray, after: np.ndarray, done: Callable[[int], None] = lambda rows: None) -> float:
    """recall@10 overlap of unit vectors [n, d] and [n, e], n above 10: every row asks all others."""
    shared = 0
    for start in range(0, len(before), QUERIES):
        nearest_a, nearest_b = (_nearest(x, start) for x in (before, after))
        shared += int((nearest_a[:, :, None] == nearest_b[:, None, :]).sum())
        done(len(nearest_a))
    return shared / (len(before) * NEIGHBOURS)


def _nearest(x: np.ndarray, start: int) -> np.ndarray:
    """The nearest rows to each of `QUERIES` rows from `start`, themselves left out: int64 [q, 10], unordered."""
    cosines = x[start : start + QUERIES] @ x.T
    rows = np.arange(len(cosines))
    cosines[rows, start + rows] = -np.inf
    return np.argpartition(cosines, -NEIGHBOURS, axis=1)[:, -NEIGHBOURS:]


def _unit(x: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.maximum(lengths, np.finfo(np.float32).tiny)
