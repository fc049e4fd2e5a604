"""Text transforms: none | center | whiten:k[,shrink=α]. Closed-form, fitted once, nothing learned.

    x ← x / |x|;  x ← x − μ;  x ← Vₖᵀx / √(λ_α + ε·λ̄);  x ← x / |x|        λ_α = (1 − α)·λ + α·λ̄

μ and the eigenpairs (λ, V) are those of the covariance over the distinct captions of the training index,
in float64, and λ̄ is the mean eigenvalue. `center` stops before the projection. α (shrink) runs from
whitening (0) to centring (1, on k directions). Captions that a cache holds beyond the training index have
no part in it.

Why: raw embeddings of a language model lie in a narrow cone (a caption and its word-swapped twin have
cosine 0.93 to 0.98), and the differences that matter lie in directions of small variance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from lift_cache.errors import BadConfig, CacheDamaged
from lift_cache.keys import sort_order
from lift_trainer.config import TransformSpec
from lift_trainer.tensors import write_tensors
from lift_trainer.text import TextVectors

EPSILON = 1e-6
MAX_FITTED = 1 << 20
"""Captions that are looked at; with more, those with the smallest keys, which is a fixed random sample."""

CAPTIONS_PER_DIRECTION = 10
BLOCK = 8192


@dataclass(frozen=True)
class TextTransform:
    """What turns a stored text vector into a training target; part of every checkpoint."""

    spec: TransformSpec
    mean_d: torch.Tensor | None = None
    """float32 [D]."""
    projection_dk: torch.Tensor | None = None
    """float32 [D, k]: eigenvectors, already divided by √(λ_α + ε·λ̄)."""
    eigenvalues_d: torch.Tensor | None = None
    """float64 [D], descending; kept for reports."""

    def output_dimensions(self, dimensions: int) -> int:
        return dimensions if self.projection_dk is None else self.projection_dk.shape[1]

    def to(self, device: torch.device) -> TextTransform:
        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        return TextTransform(self.spec, move(self.mean_d), move(self.projection_dk), self.eigenvalues_d)

    def __call__(self, x_nd: torch.Tensor) -> torch.Tensor:
        """Stored vectors [N, D] of any float dtype → unit vectors, float32 [N, D or k]."""
        x = F.normalize(x_nd.float(), dim=-1)
        if self.mean_d is not None:
            x = x - self.mean_d
        if self.projection_dk is not None:
            x = x @ self.projection_dk
        return F.normalize(x, dim=-1)

    def save(self, path: Path) -> None:
        """Write `text-transform.safetensors`."""
        tensors = {"mean": self.mean_d, "projection": self.projection_dk, "eigenvalues": self.eigenvalues_d}
        write_tensors(
            path,
            {name: tensor for name, tensor in tensors.items() if tensor is not None},
            {"spec": str(self.spec)},
        )

    @classmethod
    def load(cls, path: Path) -> TextTransform:
        """Raises CacheDamaged."""
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                spec = TransformSpec.parse(file.metadata()["spec"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CacheDamaged(f"{path} is not a text transform ({error})") from None
        return cls(spec, tensors.get("mean"), tensors.get("projection"), tensors.get("eigenvalues"))


def fit_transform(spec: TransformSpec, text: TextVectors, keys: np.ndarray) -> TextTransform:
    """Fit to the distinct captions of a training index.

    Args:
        text: their vectors, u of them.
        keys: uint8 [u, 16], their keys. Sums run in key order, so that neither the order of the data nor
            that of the cache changes a bit.

    Raises:
        BadConfig: k beyond the numerical rank, or fewer than 10·k captions; names the largest safe k.
    """
    if spec.kind == "none":
        return TextTransform(spec)
    fitted = sort_order(keys)[:MAX_FITTED]
    mean = sum(block.sum(0) for block in _unit_blocks(text, fitted)) / len(fitted)
    mean_d = torch.from_numpy(mean.astype(np.float32))
    if spec.kind == "center":
        return TextTransform(spec, mean_d)

    covariance = np.zeros((text.dimensions, text.dimensions))
    for block in _unit_blocks(text, fitted):
        centred = block - mean
        covariance += centred.T @ centred
    covariance /= len(fitted)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
    # Variance that rounding to the stored dtype makes by itself: below it a direction is noise.
    noise = text.resolution**2 / text.dimensions
    rank = int((values > max(noise, values[0] * len(values) * np.finfo(np.float64).eps)).sum())
    enough = len(fitted) // CAPTIONS_PER_DIRECTION
    if spec.k > min(rank, enough):
        few = f"there are {len(fitted)} distinct training captions"
        why = few if spec.k > enough else f"the captions span {rank} directions"
        safe = min(rank, enough)
        advice = f"the largest safe k is {safe}" if safe else "use center or none"
        raise BadConfig(f"--text-transform {spec}: k = {spec.k} is too large, {why}; {advice}")
    average = values.mean()
    shrunk = (1 - spec.shrink) * values[: spec.k] + spec.shrink * average
    vectors = vectors[:, : spec.k]
    # An eigenvector's sign is arbitrary: the largest entry is made positive.
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(spec.k)])
    projection = vectors / np.sqrt(shrunk + EPSILON * average)
    return TextTransform(
        spec,
        mean_d,
        torch.from_numpy(projection.astype(np.float32)),
        torch.from_numpy(np.ascontiguousarray(values)),
    )


def _unit_blocks(text: TextVectors, order: np.ndarray) -> Iterator[np.ndarray]:
    """Unit vectors, float64 [≤ BLOCK, D] at a time."""
    for start in range(0, len(order), BLOCK):
        block = text.gather(order[start : start + BLOCK]).astype(np.float64)
        yield block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), np.finfo(np.float64).tiny)
