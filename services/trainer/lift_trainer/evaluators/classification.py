"""Was the right class chosen? From scores per class to ranks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

CUTOFF = 5
NEVER = 1 << 62
"""Rank of what cannot be compared."""


class Ranked(NamedTuple):
    rank: np.ndarray
    """int64 [n]: of the right class among c, 1 is best: 1 + the wrong ones that score at least as high."""
    margin: np.ndarray
    """float64 [n]: score of the right class less that of the best wrong one."""

    def top(self, k: int) -> np.ndarray:
        """float64 [n]: 1.0 where the right class is among the first k."""
        return (self.rank <= k).astype(float)


def rank_classes(scores_nc: torch.Tensor, labels: torch.Tensor) -> Ranked:
    """
    Args:
        scores_nc: higher is better. Where the right one is no number, its rank is NEVER.
        labels: int64 [n], the right class of each.
    """
    own_n1 = scores_nc.gather(1, labels[:, None])
    wrong = torch.ones_like(scores_nc, dtype=torch.bool).scatter_(1, labels[:, None], False)
    # Not `>=`, which is false for NaN: what cannot be compared stands before.
    rank = 1 + (~(scores_nc < own_n1) & wrong).sum(1)
    rank = torch.where(own_n1[:, 0].isnan(), NEVER, rank)
    best = scores_nc.masked_fill(~wrong, -torch.inf).amax(1)
    return Ranked(rank.cpu().numpy(), (own_n1[:, 0].double() - best.double()).cpu().numpy())
