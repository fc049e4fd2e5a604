"""Probes: how well do the states before the head tell classes apart, without any text?

`knn`: the k training images of greatest cosine vote with weight exp(cosine / 0.07), as in DINO (Caron et al. 2021,
eval_knn.py). Those that tie for the last places share them, so no order of the data matters.

`linear`: multinomial logistic regression on standardised states, mean cross-entropy + λ/2 · |W|², the bias free.
λ is the one that does best on a fifth of each class's training images; then all of them are fitted. Full-batch
L-BFGS in float64: the minimum is the same whatever the order, and no seed has a part in it but that of the split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from lift_cache.errors import BadSource
from lift_cache.tools.common import progress
from lift_trainer.evaluators.classification import rank_classes
from lift_trainer.evaluators.images import encode
from lift_trainer.evaluators.items import Items
from lift_trainer.evaluators.labelled import Labelled
from lift_trainer.evaluators.protocol import Encoder
from lift_trainer.evaluators.result import Result, scored
from lift_trainer.rejects import Rejects
from lift_trainer.sampling import ORDER, permutation

TEMPERATURE = 0.07
CELLS = 1 << 24
"""Similarities held at a time."""

STRENGTHS = tuple(10.0**power for power in range(1, -7, -1))
"""λ that are tried, strongest first: each begins where the one before ended."""
UNCHOSEN = 1e-2
"""λ where no class has an image to spare."""
HELD_OUT_SHARE = 5
ITERATIONS = 1000
GRADIENT = 1e-7
"""Largest entry at which the minimum is reached."""


def knn_votes(
    train_nd: torch.Tensor, labels: torch.Tensor, test_md: torch.Tensor, k: int, classes: int
) -> torch.Tensor:
    """Votes for each class: states [n, D] with labels int64 [n], states [m, D] → [m, c]."""
    train, test = F.normalize(train_nd, dim=-1), F.normalize(test_md, dim=-1)
    k = min(k, len(train))
    votes = []
    at_once = max(1, CELLS // len(train))
    for start in range(0, len(test), at_once):
        cosine_bn = test[start : start + at_once] @ train.T
        last_b1 = cosine_bn.topk(k).values[:, -1:]
        nearer, equal = cosine_bn > last_b1, cosine_bn == last_b1
        places = (k - nearer.sum(1, keepdim=True)) / equal.sum(1, keepdim=True)
        share = nearer + equal * places.to(cosine_bn.dtype)
        # Relative to the nearest, which changes no order, so that float32 does not lose the far ones.
        weight = ((cosine_bn - cosine_bn.amax(1, keepdim=True)) / TEMPERATURE).exp() * share
        votes.append(weight.new_zeros(len(weight), classes).index_add_(1, labels, weight))
    return torch.cat(votes)


class Linear(NamedTuple):
    weight: torch.Tensor
    """float64 [c, D]."""
    bias: torch.Tensor
    """float64 [c]."""
    gradient: float
    """Largest entry of what is left of it."""

    def __call__(self, states_nd: torch.Tensor) -> torch.Tensor:
        return states_nd @ self.weight.T + self.bias


def fit_linear(
    states_nd: torch.Tensor, labels: torch.Tensor, classes: int, strength: float, start: Linear | None = None
) -> Linear:
    """The minimum of mean cross-entropy + strength/2 · |W|² over W and b.

    Args:
        states_nd: float64 [n, D]. labels: int64 [n].
        start: where to begin; it changes the time, not the minimum.

    States that are not finite have no minimum: the weights are no numbers then, so that every answer is wrong.
    """
    if not states_nd.isfinite().all():
        nan = states_nd.new_full((classes, states_nd.shape[1]), torch.nan)
        return Linear(nan, nan[:, 0], torch.nan)
    weight, bias = (
        (start.weight.clone(), start.bias.clone())
        if start
        else (states_nd.new_zeros(classes, states_nd.shape[1]), states_nd.new_zeros(classes))
    )
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    solver = torch.optim.LBFGS(
        parameters,
        max_iter=ITERATIONS,
        max_eval=2 * ITERATIONS,
        tolerance_grad=GRADIENT,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = F.cross_entropy(states_nd @ weight.T + bias, labels) + strength / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
        loss()
    left = max(float(parameter.grad.abs().max()) for parameter in parameters if parameter.grad is not None)
    return Linear(weight.detach(), bias.detach(), left)


def held_out(labels: np.ndarray) -> np.ndarray:
    """bool [n]: a fifth of each class, but never all of it."""
    order = permutation(len(labels), 0, ORDER)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = order[labels[order] == label]
        chosen[own[: -(-len(own) // HELD_OUT_SHARE) if len(own) > 1 else 0]] = True
    return chosen


class Chosen(NamedTuple):
    linear: Linear
    strength: float
    tried: dict[str, float]
    """λ → accuracy on the part that was held out; empty where there was none."""


def choose_linear(states_nd: torch.Tensor, labels: torch.Tensor, classes: int) -> Chosen:
    """Fit with the λ that does best on held-out training images; of equals, the strongest."""
    apart = torch.from_numpy(held_out(labels.cpu().numpy())).to(labels.device)
    tried: dict[float, float] = {}
    fitted: dict[float, Linear] = {}
    last: Linear | None = None
    if apart.any():
        with progress(len(STRENGTHS), "linear probes") as advance:
            for strength in STRENGTHS:
                last = fitted[strength] = fit_linear(
                    states_nd[~apart], labels[~apart], classes, strength, last
                )
                ranked = rank_classes(last(states_nd[apart]), labels[apart])
                tried[strength] = float(ranked.top(1).mean())
                advance(1)
    best = max(tried, key=tried.__getitem__, default=UNCHOSEN)
    final = fit_linear(states_nd, labels, classes, best, fitted.get(best))
    return Chosen(final, best, {f"{strength:g}": score for strength, score in tried.items()})


def standardised(train_nd: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """float64, with the mean and standard deviation of the first; a state that never changes becomes 0."""
    mean, std = train_nd.double().mean(0), train_nd.double().std(0, correction=0)
    std = torch.where(std > 1e-12 * mean.abs().clamp(min=1), std, torch.inf)
    return [(states.double() - mean) / std for states in (train_nd, *others)]


@dataclass(frozen=True)
class Probe:
    name: str
    train: Labelled
    test: Labelled
    k: int
    rejects: Rejects
    """Of both, before any image is read, and how many may be left out in all."""

    task = "probe"

    def __post_init__(self) -> None:
        """Raises BadSource: a class to test that was never trained."""
        unknown = [label for label in self.test.classes if label not in self.train.classes]
        if unknown:
            raise BadSource(f"class {unknown[0]!r} of the test images has no training image; add some")

    @property
    def protocol(self) -> str:
        return f"knn{self.k}"

    @property
    def scores(self) -> list[str]:
        return ["knn", "linear"]

    def evaluate(self, encoder: Encoder) -> Result:
        rejects = Rejects(self.rejects.limit)
        rejects.named.update(self.rejects.named)
        x_nd, kept = encode(self.train.index, encoder, rejects, "training images", by=encoder.features)
        train = self.train.take(kept)
        z_md, kept = encode(self.test.index, encoder, rejects, "test images", by=encoder.features)
        test = self.test.take(kept)
        classes = self.train.classes
        place = np.array([classes.index(label) for label in test.classes])
        labels = torch.from_numpy(train.labels).to(x_nd.device)
        truth = torch.from_numpy(place[test.labels]).to(x_nd.device)

        neighbours = rank_classes(
            knn_votes(x_nd.double(), labels, z_md.double(), self.k, len(classes)), truth
        )
        states_nd, states_md = standardised(x_nd, z_md)
        chosen = choose_linear(states_nd, labels, len(classes))
        linear = rank_classes(chosen.linear(states_md), truth)
        image = np.arange(len(kept))
        items = {"knn": Items.of(image, neighbours.top(1)), "linear": Items.of(image, linear.top(1))}
        return Result(
            task=self.task,
            protocol=self.protocol,
            name=self.name,
            data=_digest([train, test]),
            subject=encoder.subject,
            scores=scored(items, chance=dict.fromkeys(items, 1 / len(classes))),
            items=items,
            left_out=rejects.named,
            details={
                "of": len(self.test.index),
                "train": len(train.labels),
                "classes": len(classes),
                "k": self.k,
                "temperature": TEMPERATURE,
                "ties": int((neighbours.margin == 0).sum()),
                "strength": chosen.strength,
                "held_out": chosen.tried,
                "gradient": chosen.linear.gradient,
            },
        )


def _digest(data: Sequence[Labelled]) -> str:
    joined_up = "\0".join(some.digest for some in data)
    return hashlib.blake2b(joined_up.encode(), digest_size=16).hexdigest()
