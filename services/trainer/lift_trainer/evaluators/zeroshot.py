"""Zero-shot classification: is an image nearest to the text of its class?

    names × templates → prompts → embed → transform → normalise → average per class → normalise → w
    image → x      its class is that of the greatest x·w

As in CLIP (Radford et al. 2021), with any encoder of captions. A tie with a wrong class is wrong; two classes of one
name tie always.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lift_trainer.evaluators.classification import CUTOFF, Ranked, rank_classes
from lift_trainer.evaluators.images import encode
from lift_trainer.evaluators.items import Items
from lift_trainer.evaluators.labelled import Labelled
from lift_trainer.evaluators.protocol import NEAR, Encoder
from lift_trainer.evaluators.result import Result, scored
from lift_trainer.evaluators.templates import Templates
from lift_trainer.rejects import Rejects

BLOCK = 4096
"""Images compared with all classes at a time."""

PROMPTS = 16_384
"""Embedded at a time: 80 templates of 1,000 classes and 4,096 dimensions would be 1.3 GB."""


def class_vectors(prompts_ctd: torch.Tensor) -> torch.Tensor:
    """Unit vectors of t prompts for each of c classes, [c, t, D] → unit vectors of the classes, [c, D]."""
    return F.normalize(prompts_ctd.double().mean(1), dim=-1).to(prompts_ctd.dtype)


def classify(
    x_nd: torch.Tensor, names_ud: torch.Tensor, name_of_class: torch.Tensor, labels: torch.Tensor
) -> Ranked:
    """Rank of each image's class.

    Args:
        x_nd, names_ud: unit vectors of images and of distinct names.
        name_of_class: int64 [c]. Classes of one name tie exactly so, as two products with equal vectors need not.
        labels: int64 [n].
    """
    found = [
        rank_classes(
            (x_nd[start : start + BLOCK] @ names_ud.T)[:, name_of_class], labels[start : start + BLOCK]
        )
        for start in range(0, len(x_nd), BLOCK)
    ]
    return Ranked(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))


@dataclass(frozen=True)
class ZeroShot:
    name: str
    images: Labelled
    names: Sequence[str]
    """Of each class of the images."""
    templates: Templates
    rejects: Rejects
    """Of the data, before any image is read, and how many may be left out in all."""

    task = "zeroshot"

    @property
    def protocol(self) -> str:
        return self.templates.name

    @property
    def scores(self) -> list[str]:
        return ["top1", "top5", "per_class"]

    def evaluate(self, encoder: Encoder) -> Result:
        names = [*dict.fromkeys(self.names)]
        names_ud, prompt_mean = self._name_vectors(names, encoder)  # first, as they may be missing
        rejects = Rejects(self.rejects.limit)
        rejects.named.update(self.rejects.named)
        x_nd, kept = encode(self.images.index, encoder, rejects)
        images = self.images.take(kept)
        name_of_class = torch.tensor([names.index(name) for name in self.names], device=x_nd.device)
        ranked = classify(x_nd, names_ud, name_of_class, torch.from_numpy(images.labels).to(x_nd.device))
        without = set(range(len(self.names))) - set(images.labels.tolist())
        image = np.arange(len(kept))
        items = {
            "top1": Items.of(image, ranked.top(1)),
            "top5": Items.of(image, ranked.top(CUTOFF)),
            "per_class": Items.of(image, ranked.top(1), images.labels),
        }
        chance, several = 1 / len(self.names), min(CUTOFF, len(self.names)) / len(self.names)
        return Result(
            task=self.task,
            protocol=self.protocol,
            name=self.name,
            data=self._digest(images),
            subject=encoder.subject,
            scores=scored(items, chance={"top1": chance, "top5": several, "per_class": chance}),
            items=items,
            left_out=rejects.named,
            details={
                "of": len(self.images.index),
                "classes": len(self.names),
                "classes_without_image": [self.names[i] for i in sorted(without)],
                "classes_of_one_name": sorted(n for n, times in Counter(self.names).items() if times > 1),
                "templates": len(self.templates.sentences),
                "ties": int((ranked.margin == 0).sum()),
                "near_ties": int((abs(ranked.margin) < NEAR).sum()),
                "prompts_to_training_captions": _between(prompt_mean, encoder.mean_text()),
            },
        )

    def _name_vectors(self, names: Sequence[str], encoder: Encoder) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors of distinct names, [u, D], and the mean of all prompts' unit vectors, float64 [D]."""
        found, sums = [], []
        at_once = max(1, PROMPTS // len(self.templates.sentences))
        for start in range(0, len(names), at_once):
            some = names[start : start + at_once]
            y_nd = encoder.embed_texts([prompt for name in some for prompt in self.templates.of(name)])
            found.append(class_vectors(y_nd.unflatten(0, (len(some), -1))))
            sums.append(y_nd.double().sum(0))
        prompts = len(names) * len(self.templates.sentences)
        return torch.cat(found), torch.stack(sums).sum(0) / prompts

    def _digest(self, images: Labelled) -> str:
        named = "\0".join([images.digest, *self.names])
        return hashlib.blake2b(named.encode(), digest_size=16).hexdigest()


def _between(prompts_d: torch.Tensor, captions_d: torch.Tensor | None) -> dict[str, Any] | None:
    """How far prompts lie from what was trained on: means of unit vectors, so 0 … 2. None without captions."""
    if captions_d is None:
        return None
    captions_d = captions_d.double()
    return {
        "distance": float((prompts_d - captions_d).norm()),
        "cosine": float(F.cosine_similarity(prompts_d, captions_d, dim=0)),
    }
