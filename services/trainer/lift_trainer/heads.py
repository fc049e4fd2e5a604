"""Heads: from the pooled states of a tower, or from a stored text vector, into the common space.

Each maps [B, width] to [B, dimensions], not normalised. `none` keeps what it is given (ShareLock's image
side, and the text side of everything that trains against the cache as it is).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lift_cache.errors import BadConfig
from lift_trainer.config import HeadName
from lift_trainer.distributed import mean, world_size


def unit_vectors(vectors_bd: torch.Tensor) -> torch.Tensor:
    """[B, D] at unit length, in float32 or what is finer: a loss in bf16 would see three digits."""
    if vectors_bd.dtype in (torch.bfloat16, torch.float16):
        vectors_bd = vectors_bd.float()
    return F.normalize(vectors_bd, dim=-1)


class NoHead(nn.Identity):
    """[B, width] as it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dimensions = width


class LinearHead(nn.Linear):
    """One matrix and a bias: [B, width] → [B, dimensions]."""

    def __init__(self, width: int, dimensions: int) -> None:
        super().__init__(width, dimensions)
        self.dimensions = dimensions


class MLPHead(nn.Sequential):
    """LIFT's: Linear [width → D], GELU, Linear [D → D]."""

    def __init__(self, width: int, dimensions: int) -> None:
        super().__init__(nn.Linear(width, dimensions), nn.GELU(), nn.Linear(dimensions, dimensions))
        self.dimensions = dimensions


class GatedHead(nn.Module):
    """SAIL's (Zhang et al. 2024): W₃(ReLU6(W₁x) · W₂x), x = LayerNorm of [B, width].

    W₁ and W₂ widen to `expand` · width, W₃ brings the product to [B, dimensions]; all have biases and start
    as in the authors' code, Xavier-uniform and zero.
    """

    LIMIT = 1e3
    """Bound on W₁x and W₂x, from the authors' code: the product of two large numbers is what overflows."""

    def __init__(self, width: int, dimensions: int, expand: int = 8) -> None:
        super().__init__()
        self.dimensions = dimensions
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, expand * width)
        self.value = nn.Linear(width, expand * width)
        self.out = nn.Linear(expand * width, dimensions)
        for layer in (self.gate, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, states_bw: torch.Tensor) -> torch.Tensor:
        x_bw = self.norm(states_bw)
        gate_bh = F.relu6(self.gate(x_bw))
        return self.out(gate_bh * self.value(x_bw).clamp(-self.LIMIT, self.LIMIT))


class ShareLockHead(nn.Sequential):
    """ShareLock's text MLP (Ruthardt et al. 2024): four linear layers, the hidden ones 4,096 wide.

    Three times (Linear, batch norm, ReLU, dropout 0.2), then Linear: [B, width] → [B, dimensions]. In train
    mode the statistics are those of the global batch, so a rank must see B ≥ 1 and all ranks together ≥ 2.
    """

    def __init__(
        self, width: int, dimensions: int, hidden: int = 4096, layers: int = 4, dropout: float = 0.2
    ) -> None:
        blocks: list[nn.Module] = []
        for _ in range(layers - 1):
            blocks += [nn.Linear(width, hidden), BatchNorm(hidden), nn.ReLU(), nn.Dropout(dropout)]
            width = hidden
        super().__init__(*blocks, nn.Linear(width, dimensions))
        self.dimensions = dimensions


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over the global batch in train mode: [B, width] → [B, width], with its gradient.

    torch's SyncBatchNorm wants a GPU; this one runs wherever the ranks do. On one rank it is torch's own.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        with torch.autocast(input.device.type, enabled=False):
            x_bw = input if input.dtype == torch.float64 else input.float()
            mean_w = mean(x_bw.mean(0))
            centred_bw = x_bw - mean_w
            variance_w = mean(centred_bw.square().mean(0))
            out_bw = centred_bw * (variance_w + self.eps).rsqrt() * self.weight + self.bias
            with torch.no_grad():
                samples = len(input) * world_size()
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean_w, self.momentum)
                self.running_var.lerp_(variance_w * samples / (samples - 1), self.momentum)
        return out_bw.to(input.dtype)


def build_head(name: HeadName, width: int, dimensions: int) -> nn.Module:
    """A head with fresh weights (from torch's global generator).

    Args:
        width: of what it is given.
        dimensions: of the common space.

    Raises:
        BadConfig: `none` where the two differ.
    """
    match name:
        case "none":
            if width != dimensions:
                raise BadConfig(
                    f"no head, but the vectors have {width} dimensions on one side and {dimensions} on the other; "
                    "use a head (linear, mlp, gated) on either side"
                )
            return NoHead(width)
        case "linear":
            return LinearHead(width, dimensions)
        case "mlp":
            return MLPHead(width, dimensions)
        case "gated":
            return GatedHead(width, dimensions)
        case "sharelock":
            return ShareLockHead(width, dimensions)
