"""The losses once more, in float64 NumPy, one term at a time, with gradients by central differences.

Written from the formulas in `lift_trainer.losses`, sharing no code with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

STEP = 1e-6


@dataclass(frozen=True)
class Problem:
    """N images with P texts each, some absent, and M further texts."""

    x: np.ndarray
    """[N, D]."""
    y: np.ndarray
    """[N, P, D]."""
    captions: np.ndarray
    """[N, P]; −1: absent."""
    images: np.ndarray
    """[N]."""
    extra: np.ndarray
    """[M, D]."""
    extra_captions: np.ndarray
    known: np.ndarray
    """[N, K]; −1: fewer."""
    scale: float = 1 / 0.07
    bias: float = -10.0

    @classmethod
    def make(
        cls, images: int = 6, texts: int = 1, extra: int = 0, dimensions: int = 5, seed: int = 0
    ) -> Problem:
        """With an equal caption on images 1 and 3, image 0 twice (as 0 and 5), and, with several texts,
        some images that have fewer."""
        rng = np.random.default_rng(seed)

        def unit(*shape: int) -> np.ndarray:
            values = rng.normal(size=shape)
            return values / np.linalg.norm(values, axis=-1, keepdims=True)

        captions = np.arange(images * texts).reshape(images, texts)
        captions[3, -1] = captions[1, 0]
        if texts > 1:
            captions[2, 1:] = -1
            captions[4, -1] = -1
        numbers = np.arange(images)
        numbers[5] = 0
        known = np.concatenate([captions, 100 + np.arange(images)[:, None]], 1)
        known[1, -1] = -1
        extra_captions = np.concatenate([[captions[1, 0], 102, 100], 200 + np.arange(extra)])[:extra]
        return cls(
            unit(images, dimensions),
            unit(images, texts, dimensions),
            captions,
            numbers,
            unit(extra, dimensions),
            extra_captions,
            known,
        )

    def hidden(self, mask: str, i: int, j: int, q: int) -> bool:
        """Whether text q of image j is neither positive nor negative of image i ≠ j."""
        if mask == "none":
            return False
        own = {int(c) for c in self.captions[i] if c >= 0}
        return int(self.captions[j, q]) in own or (
            mask == "caption+image" and bool(self.images[i] == self.images[j])
        )

    def texts(self) -> list[tuple[int, int]]:
        return [
            (j, q) for j in range(len(self.y)) for q in range(self.y.shape[1]) if self.captions[j, q] >= 0
        ]

    def count(self, i: int) -> int:
        return int((self.captions[i] >= 0).sum())


def infonce(p: Problem, mask: str) -> float:
    total = 0.0
    dots = np.einsum("id,jqd->ijq", p.x, p.y)
    further = p.x @ p.extra.T
    for i in range(len(p.x)):
        negatives = sum(
            math.exp(p.scale * dots[i, j, q]) for j, q in p.texts() if j != i and not p.hidden(mask, i, j, q)
        ) + sum(
            math.exp(p.scale * further[i, m])
            for m in range(len(p.extra))
            if p.extra_captions[m] not in p.known[i]
        )
        for q in range(p.y.shape[1]):
            if p.captions[i, q] < 0:
                continue
            own = math.exp(p.scale * dots[i, i, q])
            images = sum(
                math.exp(p.scale * dots[j, i, q])
                for j in range(len(p.x))
                if j == i or not p.hidden(mask, j, i, q)
            )
            total -= (math.log(own / (own + negatives)) + math.log(own / images)) / p.count(i)
    return total / (2 * len(p.x))


def siglip(p: Problem, mask: str) -> float:
    def log_sigmoid(z: float) -> float:
        return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))

    total = 0.0
    for i in range(len(p.x)):
        for j, q in p.texts():
            if i == j or not p.hidden(mask, i, j, q):
                logit = p.scale * float(p.x[i] @ p.y[j, q]) + p.bias
                total -= log_sigmoid(logit if i == j else -logit) / p.count(j)
        for m in range(len(p.extra)):
            if p.extra_captions[m] not in p.known[i]:
                total -= log_sigmoid(-(p.scale * float(p.x[i] @ p.extra[m]) + p.bias))
    return total / len(p.x)


def cosine(p: Problem, mask: str) -> float:
    return sum((1 - float(p.x[i] @ p.y[i, q])) / p.count(i) for i, q in p.texts()) / len(p.x)


LOSSES: dict[str, Callable[[Problem, str], float]] = {"infonce": infonce, "siglip": siglip, "cosine": cosine}


def gradients(loss: Callable[[Problem, str], float], p: Problem, mask: str) -> dict[str, np.ndarray]:
    """By central differences, of x, y, extra, log scale and bias."""

    def slope(up: Problem, down: Problem) -> float:
        return (loss(up, mask) - loss(down, mask)) / (2 * STEP)

    def moved(field: str, at: tuple[int, ...], by: float) -> Problem:
        values = getattr(p, field).copy()
        values[at] += by
        return replace(p, **{field: values})

    found = {}
    for field in ("x", "y", "extra"):
        array = getattr(p, field)
        found[field] = np.empty(array.shape)
        for at in np.ndindex(array.shape):
            found[field][at] = slope(moved(field, at, STEP), moved(field, at, -STEP))
    up, down = (replace(p, scale=p.scale * math.exp(step)) for step in (STEP, -STEP))
    found["log_scale"] = np.array(slope(up, down))
    up, down = (replace(p, bias=p.bias + step) for step in (STEP, -STEP))
    found["bias"] = np.array(slope(up, down))
    return found
