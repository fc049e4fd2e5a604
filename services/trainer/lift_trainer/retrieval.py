"""Retrieval: does an image find its captions among all captions, and a caption its images among all images?

Protocol `any-caption`: image to text is right when any of the image's captions is among the first k; text to
image when an image that has this caption is. Captions that are equal after normalisation are one text:
one item, one query, right for every image that has it. A tie with a wrong item counts against the score.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lift_cache.errors import BadConfig
from lift_cache.files import write_atomic
from lift_trainer.evaluators.images import encode
from lift_trainer.evaluators.trained import TrainedRun
from lift_trainer.rejects import Rejects
from lift_trainer.samples import Index, build_index
from lift_trainer.sampling import GALLERY, permutation

CUTOFFS = (1, 5, 10)
GALLERY_CAPTIONS = 12
GALLERY_IMAGES = 5
BLOCK = 1024

Recall = dict[str, float]


@dataclass(frozen=True)
class RetrievalResult:
    """What is written to `eval/retrieval-NAME.json`."""

    task: str
    protocol: str
    items: int
    """Images."""
    captions: int
    """Distinct captions."""
    pairs: int
    """(image, caption) pairs."""
    chance: Recall
    """Mean over both directions of what random order scores."""
    image_to_text: Recall
    text_to_image: Recall
    ranks: dict[str, list[int]]
    """Per query, 1 is best: `image_to_text` by image, `text_to_image` by distinct caption."""
    gallery: list[dict[str, Any]]
    left_out: dict[str, str]
    checkpoint: str
    step: int
    snapshot: str | None
    recipe: str | None
    """Fingerprint."""
    text_control: str
    text_transform: str

    @property
    def mean_r10(self) -> float:
        return (self.image_to_text["r@10"] + self.text_to_image["r@10"]) / 2

    def table(self) -> str:
        rows = [
            ("image to text", self.image_to_text),
            ("text to image", self.text_to_image),
            ("chance", self.chance),
        ]
        head = f"{self.items:,} images, {self.captions:,} captions".ljust(32) + "".join(
            f"{f'R@{k}':>8}" for k in CUTOFFS
        )
        return "\n".join(
            [head]
            + [name.ljust(32) + "".join(f"{recall[f'r@{k}']:8.1%}" for k in CUTOFFS) for name, recall in rows]
        )


class Ranks(NamedTuple):
    """Best rank of a right item, 1 is best: int64 [images] and int64 [distinct captions]."""

    image_to_text: np.ndarray
    text_to_image: np.ndarray


def rank(x_nd: torch.Tensor, y_ud: torch.Tensor, truth: np.ndarray) -> Ranks:
    """Rank all captions for each image and all images for each caption.

    Args:
        x_nd: image vectors, float32 [n, D], unit length.
        y_ud: vectors of distinct captions, float32 [u, D], unit length.
        truth: (image, caption) pairs that belong together, int64 [2, p]; each image and caption has one.

    A rank is 1 + the wrong items that score at least as high as the best right one.
    """
    image, caption = torch.from_numpy(truth).to(x_nd.device)
    return Ranks(_rank_items(x_nd, y_ud, image, caption), _rank_items(y_ud, x_nd, caption, image))


def _rank_items(
    query_qd: torch.Tensor, item_id: torch.Tensor, row: torch.Tensor, column: torch.Tensor
) -> np.ndarray:
    ranks = []
    for start in range(0, len(query_qd), BLOCK):
        scores = query_qd[start : start + BLOCK] @ item_id.T
        here = (row >= start) & (row < start + BLOCK)
        right = torch.zeros_like(scores, dtype=torch.bool)
        right[row[here] - start, column[here]] = True
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        # Not `>=`, which is false for NaN: what cannot be compared must not count as found.
        ranks.append(1 + (~(scores < best) & ~right).sum(1))
    return torch.cat(ranks).cpu().numpy()


def recall(ranks: np.ndarray) -> Recall:
    return {f"r@{k}": float((ranks <= k).mean()) for k in CUTOFFS}


def chance_recall(right: np.ndarray, items: int) -> Recall:
    """What random order scores, when a query has `right` (int64 [q]) right ones among `items`."""

    def none_of(k: int, r: int) -> float:
        return math.comb(items - r, k) / math.comb(items, k) if k <= items else 0.0

    counts, times = np.unique(right, return_counts=True)
    return {
        f"r@{k}": float(
            sum((1 - none_of(k, int(r))) * t for r, t in zip(counts, times, strict=True)) / len(right)
        )
        for k in CUTOFFS
    }


def evaluate_retrieval(
    run: Path,
    data: Sequence[str],
    *,
    name: str | None = None,
    images: Path | None = None,
    image_field: str = "image",
    caption_field: Sequence[str] = (),
    max_bad: int = 100,
    cache: str | None = None,
    server: str | None = None,
    device: str = "auto",
    batch_size: int = 256,
    seed: int = 0,
) -> tuple[RetrievalResult, Path]:
    """Evaluate the newest checkpoint of a run and write `RUN/eval/retrieval-NAME.json`.

    Raises:
        LiftError: no such run, unusable data, captions that are not in the cache, another recipe, vectors
            that are not finite, a name that cannot be part of a file's.
    """
    if name is not None and not re.fullmatch(r"[\w.-]+", name):
        raise BadConfig(f"--name {name!r} becomes part of a file name; use letters, digits, . _ and - only")
    trained = TrainedRun.open(run, device, cache=cache, server=server, batch_size=batch_size)
    state = trained.checkpoint.state
    rejects = Rejects(max_bad)
    index = build_index(data, rejects, caption_fields=caption_field, images=images, image_field=image_field)
    x_nd, kept = encode(index, trained, rejects)
    index = index.take(kept)
    used, pairs = np.unique(index.pairs, return_inverse=True)
    y_ud = trained.embed_texts([*index.captions.take(used)])
    image_of_pair = np.repeat(np.arange(len(index)), np.diff(index.first))
    truth = np.unique(np.stack([image_of_pair, pairs]), axis=1)
    ranks = rank(x_nd, y_ud, truth)
    by_image = chance_recall(np.bincount(truth[0]), len(used))
    by_text = chance_recall(np.bincount(truth[1]), len(index))
    result = RetrievalResult(
        task="retrieval",
        protocol="any-caption",
        items=len(index),
        captions=len(used),
        pairs=len(pairs),
        chance={cutoff: (by_image[cutoff] + by_text[cutoff]) / 2 for cutoff in by_image},
        image_to_text=recall(ranks.image_to_text),
        text_to_image=recall(ranks.text_to_image),
        ranks={direction: array.tolist() for direction, array in ranks._asdict().items()},
        gallery=_gallery(index, used, truth, x_nd, y_ud, seed),
        left_out=rejects.named,
        checkpoint=str(trained.checkpoint.path),
        step=state.step,
        snapshot=trained.subject.snapshot,
        recipe=state.recipe.fingerprint if state.recipe else None,
        text_control=state.config.text_control,
        text_transform=str(trained.transform.spec) if trained.transform else "none",
    )
    directory = run / "eval"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"retrieval-{name or _name_of(data[0])}.json"
    write_atomic(path, (json.dumps(asdict(result), indent=1) + "\n").encode())
    return result, path


def _gallery(
    index: Index, used: np.ndarray, truth: np.ndarray, x_nd: torch.Tensor, y_ud: torch.Tensor, seed: int
) -> list[dict[str, Any]]:
    """Captions drawn with a seed, never chosen, each with its best images."""
    shown = []
    for caption in permutation(len(used), seed, GALLERY)[:GALLERY_CAPTIONS].tolist():
        scores, best = (x_nd @ y_ud[caption]).topk(min(GALLERY_IMAGES, len(x_nd)))
        right = set(truth[0, truth[1] == caption].tolist())
        images = [
            {
                "sample": index.names[sample],
                "shard": index.shard(sample),
                "right": sample in right,
                "score": round(score, 6),
            }
            for sample, score in zip(best.tolist(), scores.tolist(), strict=True)
        ]
        shown.append({"caption": index.captions[used[caption]], "images": images})
    return shown


def _name_of(source: str) -> str:
    """`test` from data/test-{000..003}.tar: what tells results of one run apart."""
    stem = re.match(r"[\w.-]*?(?=[-_.]*(?:\d*\.\w+)?$|[-_.]*[{*?\[])", Path(source).name)
    return (stem[0] if stem else "") or Path(source).resolve().parent.name
