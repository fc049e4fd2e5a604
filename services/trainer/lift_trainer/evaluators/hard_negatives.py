"""Two-way choices: does an image prefer its caption to a caption that differs in one thing?

    image → x    caption → y    its false twin → y′    right where x·y > x·y′

In float32 on unit vectors, and strictly: a tie is wrong. Chance is one half. Beside each score stands the blind one,
with the mean of the training images in the place of every image: what the captions give away by themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from lift_cache.errors import BadSource
from lift_cache.keys import caption_keys
from lift_trainer.evaluators.images import Images, encode
from lift_trainer.evaluators.items import Items, mean
from lift_trainer.evaluators.protocol import NEAR, Encoder
from lift_trainer.evaluators.result import Result, scored
from lift_trainer.rejects import Rejects
from lift_trainer.sampling import GALLERY, permutation

PAIRS = 64
"""Items of each task that a report can show."""


class Choice(NamedTuple):
    """One item."""

    image: int
    caption: str
    negative: str


@dataclass(frozen=True)
class HardNegatives:
    """Items by task: the score of all is the unweighted mean of the tasks'."""

    task: str
    name: str
    images: Images
    choices: Mapping[str, Sequence[Choice]]
    max_bad: int = 0
    left_out: Mapping[str, str] | None = None
    """What could not be used of the data, before any image was read."""
    protocol: str = "two-way"

    @property
    def scores(self) -> list[str]:
        return [*self.choices, "mean", "item_mean"]

    def evaluate(self, encoder: Encoder) -> Result:
        rejects = Rejects(self.max_bad)
        rejects.named.update(self.left_out or {})
        texts = [
            *dict.fromkeys(text for choices in self.choices.values() for _, *pair in choices for text in pair)
        ]
        number = {text: i for i, text in enumerate(texts)}
        y_ud = encoder.embed_texts(texts)  # first: what is wrong with texts is known before images are read
        x_nd, kept = encode(self.images, encoder, rejects)
        place = np.full(len(self.images), -1)
        place[kept] = np.arange(len(kept))
        chosen = {
            task: [choice for choice in choices if place[choice.image] >= 0]
            for task, choices in self.choices.items()
        }
        if gone := [task for task, choices in chosen.items() if not choices]:
            raise BadSource(
                f"{self.name}: no item of {gone[0]} is left, and without it the mean over tasks would be another"
            )
        flat = [choice for choices in chosen.values() for choice in choices]
        image = np.array([choice.image for choice in flat])
        own = torch.tensor([number[choice.caption] for choice in flat], device=x_nd.device)
        other = torch.tensor([number[choice.negative] for choice in flat], device=x_nd.device)
        margin = _margins(x_nd[torch.from_numpy(place[image]).to(x_nd.device)], y_ud[own], y_ud[other])
        x_d = encoder.mean_image()
        blind = None if x_d is None else _margins(x_d.expand(len(flat), -1), y_ud[own], y_ud[other])

        group = np.repeat(np.arange(len(chosen)), [len(choices) for choices in chosen.values()])
        items = _items([*chosen], image, group, margin)
        blinds = {} if blind is None else _items([*chosen], image, group, blind)
        keys = {text: bytes(key) for text, key in zip(texts, caption_keys(texts), strict=True)}
        equal = np.array([keys[choice.caption] == keys[choice.negative] for choice in flat])
        return Result(
            task=self.task,
            protocol=self.protocol,
            name=self.name,
            data=self._digest(chosen, keys),
            subject=encoder.subject,
            scores=scored(
                items,
                chance=dict.fromkeys(items, 0.5),
                blind={name: mean(some) for name, some in blinds.items()},
            ),
            items=items,
            left_out=rejects.named,
            details={
                "of": {task: len(choices) for task, choices in self.choices.items()},
                "ties": _count(chosen, group, margin == 0),
                "equal_captions": _count(chosen, group, equal),
                "near_ties": _count(chosen, group, np.abs(margin) < NEAR),
                "pairs": [pair for task, choices in chosen.items() for pair in self._pairs(task, choices)],
            },
        )

    def _pairs(self, task: str, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        """Items drawn once for ever, so that every encoder's result on equal items has the same."""
        return [
            {
                "score": task,
                "item": item,
                "image": {"sample": self.images.names[image], "shard": self.images.shard(image)},
                "captions": [caption, negative],
            }
            for item in permutation(len(choices), 0, GALLERY)[:PAIRS].tolist()
            for image, caption, negative in [choices[item]]
        ]

    def _digest(self, chosen: Mapping[str, Sequence[Choice]], keys: Mapping[str, bytes]) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for task, choices in chosen.items():
            digest.update(f"\n{task}\n".encode())
            for choice in choices:
                digest.update(self.images.names[choice.image].encode(errors="surrogateescape") + b"\0")
                digest.update(keys[choice.caption] + keys[choice.negative])
        return digest.hexdigest()


def _margins(x_nd: torch.Tensor, y_nd: torch.Tensor, z_nd: torch.Tensor) -> np.ndarray:
    """x·y − x·z, float64 of two float32 cosines [n]: its sign is that of their comparison."""
    return ((x_nd * y_nd).sum(1).double() - (x_nd * z_nd).sum(1).double()).cpu().numpy()


def _items(
    tasks: Sequence[str], image: np.ndarray, group: np.ndarray, margin: np.ndarray
) -> dict[str, Items]:
    """By task; `mean` over the tasks' means, `item_mean` over all items."""
    right = margin > 0  # false for NaN: what cannot be compared is wrong
    return {
        **{
            task: Items.of(image[group == g], right[group == g])
            for g, task in enumerate(tasks)
            if (group == g).any()
        },
        "mean": Items.of(image, right, group),
        "item_mean": Items.of(image, right),
    }


def _count(chosen: Mapping[str, Sequence[Choice]], group: np.ndarray, what: np.ndarray) -> dict[str, int]:
    return {task: int(what[group == g].sum()) for g, task in enumerate(chosen)}
