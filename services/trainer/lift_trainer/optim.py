"""AdamW as in the paper: 1e-3, weight decay 0.2 but not on 1-d parameters, betas 0.9/0.98, cosine schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

BETAS = (0.9, 0.98)
EPS = 1e-6


def decays(parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices: not for biases, norms, the temperature or a class token ([1, 1, width])."""
    return parameter.squeeze().ndim > 1


def build_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if decays(p)], "weight_decay": weight_decay},
        {"params": [p for p in trained if not decays(p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS, fused=True)


def scaled_lr(
    lr: float, scaling: Literal["none", "sqrt", "linear"], batch_size: int, base_batch: int
) -> float:
    """Peak learning rate for a batch size, from the one that holds at `base_batch`."""
    return lr * (batch_size / base_batch) ** {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[scaling]


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up to `peak` in `warmup` steps, then half a cosine to zero at `total`."""

    peak: float
    warmup: int
    total: int

    def lr(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        return self.peak * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.total - self.warmup)))
