"""Optimisers, which parameters decay, and the learning-rate schedule.

The paper's: AdamW 1e-3, betas 0.9/0.98, epsilon 1e-6, weight decay 0.2 but not on 1-d parameters, cosine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.optim.lion import Lion
from torch import nn

from lift_trainer.config import OptimizerName, Spared

BETAS = (0.9, 0.98)
EPS = 1e-6
LION_BETAS = (0.9, 0.99)
ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8
FUSED = ("cpu", "cuda", "mps", "xpu")
"""Device types for which torch has a fused Adam."""

POSITIONS = ("pos_embed", "positional_embedding")
"""Last parts of the names of position embeddings, in timm and in open_clip."""


def decays(parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices: not for biases, norms, the temperature or a class token ([1, 1, width])."""
    return parameter.squeeze().ndim > 1


def decay_groups(model: nn.Module, weight_decay: float, spared: Spared = "1d") -> list[dict[str, Any]]:
    """The trained parameters of a model in two groups: those that decay, and those that do not.

    Args:
        spared: what does not decay. `1d`: biases, norms, temperature and bias of the loss, class token; the
            position embedding decays. That is what the paper's code does, and open_clip's own AdamW: both
            spare what has fewer than two dimensions, which their class token has ([width]) and their
            position embedding has not. `1d+positions`: the position embeddings of both towers too, as timm
            does, and open_clip when it takes an optimiser from timm. `nothing`: everything decays, as with
            ShareLock's plain Adam.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def decayed(name: str, parameter: nn.Parameter) -> bool:
        if spared == "nothing":
            return True
        position = name.rpartition(".")[2] in POSITIONS
        return decays(parameter) and not (spared == "1d+positions" and position)

    return [
        {"params": [p for name, p in named if decayed(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not decayed(name, p)], "weight_decay": 0.0},
    ]


def build_optimizer(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    *,
    name: OptimizerName = "adamw",
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    spared: Spared | None = None,
) -> torch.optim.Optimizer:
    """An optimiser of the trained parameters of a model, which lie on their device already.

    Args:
        name: `adamw`; `adam`, whose weight decay is a part of the gradient, 0.9/0.999 and 1e-8
            (ShareLock); `lion`, timm's, 0.9/0.99 (SAIL). The two Adams are fused where torch can.
        betas, eps: default: those of `name`. Lion has no epsilon.
        spared: see `decay_groups`. Default: `nothing` for `adam`, else `1d`.
    """
    groups = decay_groups(model, weight_decay, spared or ("nothing" if name == "adam" else "1d"))
    match name:
        case "adamw":
            return torch.optim.AdamW(
                groups, lr=lr, betas=betas or BETAS, eps=eps or EPS, fused=_fusible(model.parameters())
            )
        case "adam":
            return torch.optim.Adam(
                groups,
                lr=lr,
                betas=betas or ADAM_BETAS,
                eps=eps or ADAM_EPS,
                fused=_fusible(model.parameters()),
            )
        case "lion":
            return Lion(groups, lr=lr, betas=betas or LION_BETAS)


def _fusible(parameters: Iterable[nn.Parameter]) -> bool:
    return all(parameter.device.type in FUSED for parameter in parameters)


def scaled_lr(
    lr: float, scaling: Literal["none", "sqrt", "linear"], batch_size: int, base_batch: int
) -> float:
    """Peak learning rate for a batch size, from the one that holds at `base_batch`."""
    return lr * (batch_size / base_batch) ** {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[scaling]


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up to `peak` in `warmup` steps, then half a cosine to zero at `total`.

    open_clip's and the paper's, step by step. A warm-up given in samples becomes steps by `config.Span`.
    """

    peak: float
    warmup: int
    total: int

    def lr(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        return self.peak * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.total - self.warmup)))
