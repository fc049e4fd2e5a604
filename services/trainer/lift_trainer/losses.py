"""Losses between unit image vectors x and unit text vectors y of a batch.

InfoNCE in both directions (Radford et al. 2021) with a learnable temperature, and 1 − cosine on the pairs
(LIFT's contrastive-free variant). Legend: B batch, D dimensions.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

INITIAL_SCALE = 1 / 0.07
MAX_SCALE = 100.0


class LossValue(NamedTuple):
    """A loss and what to watch beside it; all tensors of shape []."""

    loss: torch.Tensor
    accuracy: torch.Tensor
    """Share of images whose own text is the most similar of the batch."""


class InfoNCE(nn.Module):
    """½ · (cross-entropy of s·xyᵀ by rows + by columns), s = exp(log_scale) within [1, 100]."""

    def __init__(self, mask: Literal["none", "caption"] = "none") -> None:
        """`mask="caption"`: an equal caption elsewhere in the batch is not counted as a negative."""
        super().__init__()
        self.mask = mask
        self.log_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))

    def clamp_(self) -> None:
        """Bring the scale back into [1, 100]; call after every optimiser step."""
        with torch.no_grad():
            self.log_scale.clamp_(0.0, math.log(MAX_SCALE))

    @property
    def scale(self) -> float:
        return float(self.log_scale.detach().exp())

    def forward(self, x_bd: torch.Tensor, y_bd: torch.Tensor, captions_b: torch.Tensor) -> LossValue:
        """float32 [B, D] twice, and int64 [B]: the number of each caption, equal where captions are equal."""
        logits_bb = self.log_scale.exp() * x_bd @ y_bd.T
        if self.mask == "caption":
            twin_bb = captions_b[:, None] == captions_b[None, :]
            twin_bb.fill_diagonal_(False)
            logits_bb = logits_bb.masked_fill(twin_bb, -torch.inf)
        own_b = torch.arange(len(x_bd), device=x_bd.device)
        loss = (F.cross_entropy(logits_bb, own_b) + F.cross_entropy(logits_bb.T, own_b)) / 2
        return LossValue(loss, (logits_bb.detach().argmax(1) == own_b).float().mean())


class Cosine(nn.Module):
    """1 − cosine of each image with its text; no negatives, no temperature."""

    scale = 1.0

    def clamp_(self) -> None:
        """Nothing is learned."""

    def forward(self, x_bd: torch.Tensor, y_bd: torch.Tensor, captions_b: torch.Tensor) -> LossValue:
        own_b = torch.arange(len(x_bd), device=x_bd.device)
        best_b = (x_bd.detach() @ y_bd.T).argmax(1)
        return LossValue(1 - (x_bd * y_bd).sum(1).mean(), (best_b == own_b).float().mean())


def build_loss(name: Literal["infonce", "cosine"], mask: Literal["none", "caption"]) -> InfoNCE | Cosine:
    return InfoNCE(mask) if name == "infonce" else Cosine()
