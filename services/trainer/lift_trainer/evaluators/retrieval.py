"""Retrieval: does an image find its captions among all captions, and a caption its images among all images?

Which captions there are, and which are right, is the protocol's:

- `karpathy`: the first five captions of each image. Image to text is right when any of the image's own is among the
  first k; text to image, once for every caption, when its own image is. An equal caption of another image is wrong,
  as in the published code; `equal_caption_pairs` says how many such pairs there are.
- `lift`: the same with the first caption only, as the paper's authors score.
- `any-caption`: all captions, of which equal ones are one text: one item, one query, right for every image that has
  it.

A tie with a wrong item counts against the score.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from lift_cache.keys import caption_keys
from lift_trainer.evaluators.captioned import Captioned
from lift_trainer.evaluators.images import encode
from lift_trainer.evaluators.items import Items
from lift_trainer.evaluators.protocol import NEAR, Encoder
from lift_trainer.evaluators.result import Result, scored
from lift_trainer.rejects import Rejects
from lift_trainer.sampling import GALLERY, permutation

Protocol = Literal["karpathy", "lift", "any-caption"]
FIRST: dict[Protocol, int | None] = {"karpathy": 5, "lift": 1, "any-caption": None}
"""Captions of each image that count."""

CUTOFFS = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")
GALLERY_CAPTIONS = 12
GALLERY_IMAGES = 5
BLOCK = 1024


@dataclass(frozen=True)
class Texts:
    """What n images are compared with: m texts, which are u distinct captions."""

    captions: Sequence[str]
    """Distinct, normalised [u]."""
    caption_of_text: np.ndarray
    """int64 [m]."""
    right: np.ndarray
    """int64 [2, p]: (image, text) pairs that belong together, each once; every image and text has one."""

    @classmethod
    def of(cls, captions: Sequence[Sequence[str]], protocol: Protocol) -> Texts:
        """Texts of images with these captions, normalised."""
        used = [texts[: FIRST[protocol]] for texts in captions]
        number = {
            caption: i for i, caption in enumerate(dict.fromkeys(text for texts in used for text in texts))
        }
        image = np.repeat(np.arange(len(used)), [len(texts) for texts in used])
        caption = np.array([number[text] for texts in used for text in texts], np.int64)
        if protocol == "any-caption":
            right = np.unique(np.stack([image, caption]), axis=1)
            return cls([*number], np.arange(len(number)), right)
        return cls([*number], caption, np.stack([image, np.arange(len(caption))]))

    @property
    def equal_pairs(self) -> int:
        """Pairs of texts of two images that are the same caption."""
        at = np.stack([self.right[0], self.caption_of_text[self.right[1]]])
        _, of_image = np.unique(at, axis=1, return_counts=True)
        of_all = np.bincount(at[1])
        return int((of_all * (of_all - 1)).sum() - (of_image * (of_image - 1)).sum()) // 2


class Ranks(NamedTuple):
    """Of queries: int64 [q] each."""

    rank: np.ndarray
    """1 + the wrong items that score at least as high as the best right one."""
    tied: np.ndarray
    """Wrong items that score the same."""
    near: np.ndarray
    """Wrong items that score about the same, ties among them."""


def rank(
    query_qd: torch.Tensor, item_ud: torch.Tensor, right: np.ndarray, vector_of_item: np.ndarray | None = None
) -> Ranks:
    """Rank all items for each query.

    Args:
        query_qd: float32 [q, D], unit length.
        item_ud: distinct vectors of items, float32 [u, D], unit length.
        right: int64 [2, p], (query, item) pairs that belong together; each query has one.
        vector_of_item: int64 [m], which vector each item has; None: its own. Equal items tie exactly then, as
            two products with the same vector need not.
    """
    query, item = torch.from_numpy(right).to(query_qd.device)
    expand = None if vector_of_item is None else torch.from_numpy(vector_of_item).to(query_qd.device)
    found = []
    for start in range(0, len(query_qd), BLOCK):
        scores = query_qd[start : start + BLOCK] @ item_ud.T
        if expand is not None:
            scores = scores[:, expand]
        here = (query >= start) & (query < start + BLOCK)
        found.append(_count(scores, query[here] - start, item[here]))
    return Ranks(*torch.cat(found, 1).cpu().numpy())


def _count(scores_bm: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """`Ranks` of some queries, int64 [3, b]. Right items are few: all are counted, and they are taken off."""
    own = scores_bm[row, column]
    best = own.new_full((len(scores_bm),), -torch.inf).scatter_reduce(0, row, own, "amax")
    best[row[own.isnan()]] = torch.nan

    def wrong(test: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        of_all = test(scores_bm, best[:, None]).sum(1)
        return of_all.index_add(0, row, test(own, best[row]).long(), alpha=-1)

    # Not `>=`, which is false for NaN: what cannot be compared must not count as found.
    before = wrong(lambda scores, best: ~(scores < best))
    near = wrong(lambda scores, best: (scores - best).abs() < NEAR)
    return torch.stack([1 + before, wrong(torch.eq), near])


def rank_texts(x_nd: torch.Tensor, y_ud: torch.Tensor, texts: Texts) -> tuple[Ranks, Ranks]:
    """Ranks of images' texts and of texts' images, from vectors of images and distinct captions."""
    vector_of_text = None
    if len(texts.captions) < len(texts.caption_of_text):
        vector_of_text = texts.caption_of_text
    y_md = y_ud if vector_of_text is None else y_ud[torch.from_numpy(vector_of_text).to(y_ud.device)]
    return rank(x_nd, y_ud, texts.right, vector_of_text), rank(y_md, x_nd, texts.right[::-1].copy())


def chance_recall(right: np.ndarray, items: int) -> dict[int, float]:
    """What random order scores at each cutoff, when a query has `right` (int64 [q]) right ones among `items`."""

    def none_of(k: int, r: int) -> float:
        return math.comb(items - r, k) / math.comb(items, k) if k <= items else 0.0

    counts, times = np.unique(right, return_counts=True)
    return {
        k: sum((1 - none_of(k, int(r))) * int(t) for r, t in zip(counts, times, strict=True)) / len(right)
        for k in CUTOFFS
    }


@dataclass(frozen=True)
class Retrieval:
    """Scores `r@K_image_to_text`, `r@K_text_to_image` and `r@K_mean` of both."""

    name: str
    data: Captioned
    protocol: Protocol = "karpathy"
    max_bad: int = 100
    left_out: dict[str, str] | None = None
    """What could not be used of the data, before any image was read."""
    seed: int = 0
    """Which captions the gallery shows."""
    task: str = "retrieval"

    @property
    def scores(self) -> list[str]:
        return [f"r@{k}_{name}" for k in CUTOFFS for name in (*DIRECTIONS, "mean")]

    def evaluate(self, encoder: Encoder) -> Result:
        rejects = Rejects(self.max_bad)
        rejects.named.update(self.left_out or {})
        every = Texts.of(self.data.captions, self.protocol).captions
        y_ed = encoder.embed_texts(every)  # first: what is wrong with texts is known before images are read
        number = {caption: i for i, caption in enumerate(every)}
        x_nd, kept = encode(self.data.images, encoder, rejects)
        texts = Texts.of([self.data.captions[image] for image in kept], self.protocol)
        y_ud = y_ed[torch.tensor([number[caption] for caption in texts.captions], device=y_ed.device)]
        ranks = rank_texts(x_nd, y_ud, texts)
        items = score_items(ranks, texts)
        return Result(
            task=self.task,
            protocol=self.protocol,
            name=self.name,
            data=self._digest(kept, texts),
            subject=encoder.subject,
            scores=scored(items, chance=_chance(len(kept), texts)),
            items=items,
            left_out=rejects.named,
            details={
                "images": len(kept),
                "texts": len(texts.caption_of_text),
                "captions": len(texts.captions),
                "equal_caption_pairs": texts.equal_pairs,
                "ties": _queries(ranks, "tied"),
                "near_ties": _queries(ranks, "near"),
                "gallery": self._gallery(kept, texts, x_nd, y_ud),
            },
        )

    def _digest(self, kept: np.ndarray, texts: Texts) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for image in kept.tolist():
            digest.update(self.data.images.names[image].encode(errors="surrogateescape") + b"\0")
        for array in (caption_keys(texts.captions), texts.caption_of_text, texts.right):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def _gallery(
        self, kept: np.ndarray, texts: Texts, x_nd: torch.Tensor, y_ud: torch.Tensor
    ) -> list[dict[str, Any]]:
        """Captions drawn with a seed, never chosen, each with its best images."""
        shown = []
        image_of, caption_of = texts.right[0], texts.caption_of_text[texts.right[1]]
        for caption in permutation(len(texts.captions), self.seed, GALLERY)[:GALLERY_CAPTIONS].tolist():
            scores, best = (x_nd @ y_ud[caption]).topk(min(GALLERY_IMAGES, len(x_nd)))
            right = set(image_of[caption_of == caption].tolist())
            images = [
                {
                    "sample": self.data.images.names[kept[image]],
                    "shard": self.data.images.shard(int(kept[image])),
                    "right": image in right,
                    "score": round(score, 6),
                }
                for image, score in zip(best.tolist(), scores.tolist(), strict=True)
            ]
            shown.append({"caption": texts.captions[caption], "images": images})
        return shown


def score_items(ranks: tuple[Ranks, Ranks], texts: Texts) -> dict[str, Items]:
    """Items of all scores; text-to-image ones belong to the (first) image that has the text."""
    _, first = np.unique(texts.right[1], return_index=True)
    images = np.arange(len(ranks[0].rank)), texts.right[0][first]
    both = np.repeat(np.arange(2), [len(image) for image in images])
    items: dict[str, Items] = {}
    for k in CUTOFFS:
        found = [direction.rank <= k for direction in ranks]
        items |= {f"r@{k}_{name}": Items.of(*of) for name, *of in zip(DIRECTIONS, images, found, strict=True)}
        items[f"r@{k}_mean"] = Items.of(np.concatenate(images), np.concatenate(found), both)
    return items


def _chance(images: int, texts: Texts) -> dict[str, float]:
    to_text = chance_recall(np.bincount(texts.right[0]), len(texts.caption_of_text))
    to_image = chance_recall(np.bincount(texts.right[1]), images)
    scores: dict[str, float] = {}
    for k in CUTOFFS:
        scores |= dict(zip((f"r@{k}_{name}" for name in DIRECTIONS), (to_text[k], to_image[k]), strict=True))
        scores[f"r@{k}_mean"] = (to_text[k] + to_image[k]) / 2
    return scores


def _queries(ranks: tuple[Ranks, Ranks], field: Literal["tied", "near"]) -> dict[str, int]:
    """Queries with such a wrong item, by direction."""
    return {
        name: int((getattr(direction, field) > 0).sum())
        for name, direction in zip(DIRECTIONS, ranks, strict=True)
    }
