"""Two-way choices: does an image prefer its caption to a caption that differs in one thing?

The tasks are SugarCrepe's (Hsieh et al. 2023), as `lift-data shapes` writes them beside each caption:
attributes or objects swapped, an attribute, object or relation replaced. Chance is one half, a tie is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lift_cache.errors import BadSource
from lift_cache.keys import normalise
from lift_cache.sources import expand, read_member, scan_tar
from lift_trainer.evaluation import TrainedRun, embed_index
from lift_trainer.rejects import Rejects
from lift_trainer.samples import build_index, captions_only

TASKS = ("swap_att", "swap_obj", "replace_att", "replace_obj", "replace_rel")


class TwoWay(NamedTuple):
    accuracy: float
    items: int


def evaluate_hard_negatives(trained: TrainedRun, data: Sequence[str]) -> dict[str, TwoWay]:
    """Accuracy by task on shards whose JSON has `negatives`: {task: caption}.

    Raises:
        BadSource: unusable shards, or none with negatives.
    """
    rejects = Rejects(0)
    index = build_index(data, rejects)
    negatives = _negatives(data)
    x_nd, _ = embed_index(trained, index, rejects, batch_size=256)
    own = [index.captions[pair] for pair in index.pairs[index.first[:-1]]]
    texts = sorted({*own, *(text for found in negatives for text in found.values())})
    number = {text: i for i, text in enumerate(texts)}
    text, _ = trained.open_text(captions_only(texts))
    y_ud = trained.embed_texts(text, np.arange(len(texts)))
    own_score = (x_nd * y_ud[[number[caption] for caption in own]]).sum(1)
    scores = {}
    for task in TASKS:
        having = [i for i, found in enumerate(negatives) if task in found]
        if having:
            other_score = (x_nd[having] * y_ud[[number[negatives[i][task]] for i in having]]).sum(1)
            scores[task] = TwoWay((own_score[having] > other_score).double().mean().item(), len(having))
    if not scores:
        raise BadSource(f"{data[0]}: no sample has negatives; such shards are made by lift-data shapes")
    return scores


def _negatives(data: Sequence[str]) -> list[dict[str, str]]:
    """Task → caption of every sample, in order."""
    found: list[dict[str, str]] = []
    for path in expand(data):
        with path.open("rb") as file:
            for sample in scan_tar(path):
                record = json.loads(read_member(file, sample.members["json"]))
                found.append({task: normalise(text) for task, text in record.get("negatives", {}).items()})
    return found
