"""95 % intervals of scores, by resampling images.

Items about one image are not independent of each other (five captions, several false twins), so whole images are
drawn, with replacement, as many as there are (the cluster bootstrap; Davison and Hinkley 1997, section 3.8), and the
interval lies between the 2.5 and 97.5 percentiles of the scores of the draws. The draws are a function of the number
of images alone: the same command gives the same interval.

A score that every item agrees on has an interval of no width; that says nothing about other data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from lift_trainer.evaluators.items import Items

DRAWS = 1000
PERCENT = (2.5, 97.5)
AT_ONCE = 1 << 22
"""Weights in memory."""


class Interval(NamedTuple):
    low: float
    high: float


def intervals(items: Mapping[str, Items]) -> dict[str, Interval]:
    """Intervals of scores by name; those over fewer than two images have none."""
    alike: dict[tuple[tuple[int, ...], tuple[int, ...] | None], list[str]] = {}
    for name, some in items.items():
        alike.setdefault((some.image, some.group), []).append(name)
    found = {}
    for (image, group), names in alike.items():
        _, cluster = np.unique(np.array(image, np.int64), return_inverse=True)
        if not len(cluster) or cluster.max() == 0:
            continue
        values_si = np.array([items[name].value for name in names])
        draws = np.concatenate(
            list(_draws(cluster, values_si, None if group is None else np.array(group))), axis=1
        )
        for name, (low, high) in zip(names, np.percentile(draws, PERCENT, axis=1).T.tolist(), strict=True):
            found[name] = Interval(low, high)
    return {name: found[name] for name in items if name in found}


def _draws(cluster: np.ndarray, values_si: np.ndarray, group: np.ndarray | None) -> Iterator[np.ndarray]:
    """Scores of some draws at a time, float64 [s, b].

    Args:
        cluster: int64 [i], image of each item, 0 … n − 1.
        values_si: of the items, by score.
        group: int64 [i]; a group of which a draw has no item does not count in it.
    """
    n = int(cluster.max()) + 1
    rng = np.random.default_rng(n)
    if group is not None:
        order = np.argsort(group, kind="stable")
        cluster, values_si = cluster[order], values_si[:, order]
        starts = np.flatnonzero(np.diff(group[order], prepend=group.min() - 1))
    items_n = np.bincount(cluster, minlength=n).astype(float)
    sums_ns = np.stack([np.bincount(cluster, weights=values, minlength=n) for values in values_si], axis=1)
    block = max(1, AT_ONCE // max(n, len(cluster) if group is not None else 0))
    for start in range(0, DRAWS, block):
        size = min(block, DRAWS - start)
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        times_bn = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(float)
        if group is None:
            yield (times_bn @ sums_ns).T / (times_bn @ items_n)
            continue
        times_bi = times_bn[:, cluster]
        items_bg = np.add.reduceat(times_bi, starts, axis=1)
        for_each = []
        for values in values_si:
            sums_bg = np.add.reduceat(times_bi * values, starts, axis=1)
            means_bg = np.divide(sums_bg, items_bg, out=np.zeros_like(sums_bg), where=items_bg > 0)
            for_each.append(means_bg.sum(1) / (items_bg > 0).sum(1))
        yield np.stack(for_each)
