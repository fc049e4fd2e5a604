"""What the ranks of one run exchange, and how that keeps a gradient the gradient of the global batch.

Every rank holds B of the N = W·B pairs of a step and computes a loss L_r such that the mean of L_r over the
W ranks is the loss of the global batch. `DistributedDataParallel` (or `average_gradients`) averages the
gradients of the ranks, and the mean of the gradients of L_r is the gradient of their mean, so one rank and
W ranks take the same step. What that asks of an exchange: its backward pass must *sum* over the ranks what
their losses say about a value that one rank made. `gather` and `mean` do; `torch.distributed`'s own calls
have no gradient.

Every function here is collective: each rank of the process group must call it, in the same order and with
the same shapes. Outside `torch.distributed` (one process) they leave their argument as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

BUCKET = 1 << 25
"""Values that `average_gradients` sends at a time (128 MiB of float32)."""


_alone = False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is the only rank: for what one rank computes while the others go on.

    Not collective; nothing inside may be.
    """
    global _alone  # noqa: PLW0603
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def world_size() -> int:
    """Ranks of the run; 1 outside torch.distributed, and `alone`. Not collective."""
    return dist.get_world_size() if not _alone and dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0. Not collective."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(values: torch.Tensor) -> torch.Tensor:
    """[B, …] of each rank → [W·B, …] of all, rank by rank.

    With gradient if and only if `values` asks for one, which must be so on all ranks or on none: text
    vectors from the cache are gathered without (half the traffic), those of a trained text side with.
    """
    if world_size() == 1:
        return values
    return _Gather.apply(values) if values.requires_grad else _all_gather(values)


def mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over the ranks, of equal shape; with gradient if `values` asks for one."""
    return _Mean.apply(values) if world_size() > 1 else values


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the ranks, in place, for a backward pass that DDP did not see.

    A parameter without a gradient is left without; it must be the same ones on every rank.
    """
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    bucket: list[torch.Tensor] = []
    for position, gradient in enumerate(gradients):
        bucket.append(gradient)
        after = gradients[position + 1] if position + 1 < len(gradients) else None
        full = sum(g.numel() for g in bucket) >= BUCKET
        if full or after is None or (after.dtype, after.device) != (gradient.dtype, gradient.device):
            _average(bucket)
            bucket = []


def _average(gradients: list[torch.Tensor]) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _all_gather(values: torch.Tensor) -> torch.Tensor:
    values = values.detach().contiguous()
    out = values.new_empty(world_size() * len(values), *values.shape[1:])
    dist.all_gather_single(out, values)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return _all_gather(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        out = gradient.new_empty(len(gradient) // world_size(), *gradient.shape[1:])
        dist.reduce_scatter_single(out, gradient.contiguous())
        return out


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        out = values.detach().clone()
        dist.all_reduce(out)
        return out / world_size()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        # The mean over the ranks again: each rank's part counts 1/W in everyone's loss.
        out = gradient.clone()
        dist.all_reduce(out)
        return out / world_size()


class ColumnLogSumExp(torch.autograd.Function):
    """log Σ_i exp(s_ij) over the rows i of all ranks, of which this one holds some: [B, T] → [T].

    So the text-to-image half of a contrastive loss needs two all-reduces of T numbers, and no rank ever
    sees another's images. Entries may be −∞; each column must have a finite one somewhere.
    """

    @staticmethod
    def forward(ctx: Any, logits_bt: torch.Tensor) -> torch.Tensor:
        top_t = logits_bt.amax(0)
        if world_size() > 1:
            dist.all_reduce(top_t, dist.ReduceOp.MAX)
        total_t = (logits_bt - top_t).exp().sum(0)
        if world_size() > 1:
            dist.all_reduce(total_t)
        out_t = top_t + total_t.log()
        ctx.save_for_backward(logits_bt, out_t)
        return out_t

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_t: torch.Tensor) -> torch.Tensor:
        logits_bt, out_t = ctx.saved_tensors
        if world_size() > 1:
            gradient_t = gradient_t.clone()
            dist.all_reduce(gradient_t)
        return (logits_bt - out_t).exp() * gradient_t


def column_logsumexp(logits_bt: torch.Tensor) -> torch.Tensor:
    """See `ColumnLogSumExp`."""
    return ColumnLogSumExp.apply(logits_bt)
