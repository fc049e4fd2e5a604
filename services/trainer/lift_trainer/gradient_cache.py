"""Large contrastive batches on few devices: GradCache (Gao et al. 2021, arXiv 2101.06983).

A contrastive loss needs all vectors of a batch at once, but what fills the memory is the towers'
activations. So the towers run twice:

    pass 1   chunk by chunk without gradient → all vectors → loss → the loss's gradient at each vector
    pass 2   chunk by chunk with gradient, from the same random state → backward from that gradient

Loss and gradients are those of the full batch. The price is one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states

from lift_cache.errors import BadConfig
from lift_trainer.distributed import average_gradients
from lift_trainer.losses import LossValue


@dataclass(frozen=True)
class CachedPath:
    """A tower and this rank's inputs to it."""

    module: nn.Module
    inputs: torch.Tensor
    """[B, …]."""
    encode: Callable[[torch.Tensor], torch.Tensor] | None = None
    """How the module is called ([b, …] → [b, D]), for instance under autocast; default: as it is."""

    @property
    def trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.module.parameters())

    def __call__(self, chunk: torch.Tensor) -> torch.Tensor:
        return (self.encode or self.module)(chunk)


def cached_backward(
    model: nn.Module, paths: Sequence[CachedPath], loss: Callable[..., LossValue], chunk: int
) -> LossValue:
    """Loss of the whole batch, its gradients added up in `.grad`, with activations of one chunk at a time.

    Collective: under torch.distributed every rank calls it, and the gradients of `model` are averaged over
    the ranks at the end (they must have been zero or None before). DDP's own averaging is held back.

    Args:
        model: all that trains, in DistributedDataParallel or not.
        paths: the towers to run in chunks. What a batch norm needs whole belongs into `loss` instead.
        loss: takes the vectors of each path, [B, D], in order; may run further modules on the full batch.
        chunk: samples of a chunk.

    Returns:
        The value of `loss`, without its graph.

    Raises:
        BadConfig: a batch norm in train mode in a path.
    """
    for path in paths:
        _refuse_batch_norm(path.module)
    with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
        vectors, states = zip(*(_first_pass(path, chunk) for path in paths), strict=True)
        value = loss(*vectors)
        value.loss.backward()
        for path, vectors_bd, begun in zip(paths, vectors, states, strict=True):
            if vectors_bd.grad is not None:
                _second_pass(path, vectors_bd.grad, begun, chunk)
    average_gradients(model.parameters())
    return value.detach()


def _first_pass(path: CachedPath, chunk: int) -> tuple[torch.Tensor, list[_RandomState]]:
    vectors, begun = [], []
    with torch.no_grad():
        for inputs in path.inputs.split(chunk):
            begun.append(_RandomState(inputs))
            vectors.append(path(inputs))
    return torch.cat(vectors).requires_grad_(path.trains), begun


def _second_pass(
    path: CachedPath, gradient_bd: torch.Tensor, begun: Sequence[_RandomState], chunk: int
) -> None:
    for inputs, gradient, state in zip(
        path.inputs.split(chunk), gradient_bd.split(chunk), begun, strict=True
    ):
        with state.replayed():
            vectors = path(inputs)
        vectors.backward(gradient)


class _RandomState:
    """torch's generators, of the CPU and of the device a tensor is on, as they are now."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._type = tensor.device.type
        self._cpu = torch.get_rng_state()
        self._devices, self._states = get_device_states(tensor)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Winds the generators back to here, and at the end forward again to where they were."""
        on_device = {"device_type": self._type} if self._devices else {}
        with torch.random.fork_rng(devices=self._devices, **on_device):
            torch.set_rng_state(self._cpu)
            set_device_states(self._devices, self._states, **on_device)
            yield


def _refuse_batch_norm(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) and part.training:
            raise BadConfig(
                f"gradient caching cannot run {name or 'this module'} ({type(part).__name__}) in chunks: its "
                "statistics would be those of a chunk, not of the batch; freeze it, or train without gradient "
                "caching"
            )
