"""Means over training data, for blind scores and distances: computed once per checkpoint, and kept."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from lift_cache.errors import LiftError
from lift_cache.files import write_atomic
from lift_trainer.evaluators.images import encode
from lift_trainer.evaluators.protocol import Encoder
from lift_trainer.rejects import Rejects
from lift_trainer.samples import Index
from lift_trainer.sampling import ORDER, permutation

MEAN_OF = 4096
"""Training images whose mean stands for that of all, drawn once for ever."""


def sample_of(index: Index) -> Index:
    """The images whose mean stands for that of all."""
    return index.take(np.sort(permutation(len(index), 0, ORDER)[:MEAN_OF]))


def mean_image(index: Index, encoder: Encoder, rejects: Rejects) -> torch.Tensor:
    """Mean of the images' unit vectors, float32 [D]. Raises LiftError: none is readable, too many are broken."""
    x_nd, _ = encode(index, encoder, rejects, "training images")
    return mean_vector(x_nd)


def mean_vector(vectors_nd: torch.Tensor) -> torch.Tensor:
    """[n, D] → float32 [D], summed in float64."""
    return vectors_nd.double().mean(0).float()


def kept_mean(
    kind: str, path: Path, compute: Callable[[], torch.Tensor], device: torch.device
) -> torch.Tensor | None:
    """A mean from its file, or computed and kept there; None, and why on stderr, where it cannot be."""
    try:
        return load_file(path)["mean"].to(device)
    except (OSError, SafetensorError, KeyError):
        pass
    try:
        mean = compute()
    except LiftError as error:
        print(f"no mean over the training {kind}s: {error}", file=sys.stderr)
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save({"mean": mean.cpu().contiguous()}))
    return mean
