"""Hard negatives beside the captions of shards, as `lift-data shapes` writes them: JSON `negatives` {task: caption}.

The tasks are SugarCrepe's (Hsieh et al. 2023): attributes or objects swapped, an attribute, object or relation
replaced.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from lift_cache.errors import BadCaption, BadSource
from lift_cache.keys import normalise
from lift_cache.sources import expand, read_member, scan_tar
from lift_trainer.evaluators.hard_negatives import Choice, HardNegatives
from lift_trainer.rejects import Rejects
from lift_trainer.samples import build_index

SPLITS = ("test", "unseen")
"""Held out by `lift-data shapes`."""

TASKS = ("swap_att", "swap_obj", "replace_att", "replace_obj", "replace_rel")


def open_shapes(data: Sequence[str], name: str, *, max_bad: int = 0) -> HardNegatives:
    """Read shards with false captions; each image's first caption is the true one.

    Raises:
        BadSource: unusable shards, negatives of another shape, or none at all.
    """
    rejects = Rejects(max_bad)
    index = build_index(data, rejects)
    own = [*index.captions.take(index.pairs[index.first[:-1]])]
    number = {index.where(i): i for i in range(len(index))}
    choices: dict[str, list[Choice]] = {task: [] for task in TASKS}
    for path in expand(data):
        with path.open("rb") as file:
            for sample in scan_tar(path):
                image = number.get(f"{path}:{sample.key}")
                if image is None:  # without a usable caption or image, and so named already
                    continue
                record = read_member(file, sample.members["json"]) if "json" in sample.members else b"{}"
                for task, caption in _negatives(record, f"{path}:{sample.key}").items():
                    choices[task].append(Choice(image, own[image], caption))
    found = {task: some for task, some in choices.items() if some}
    if not found:
        raise BadSource(f"{data[0]}: no sample has negatives; such shards are made by lift-data shapes")
    return HardNegatives("shapes", name, index, found, max_bad=max_bad, left_out=rejects.named)


def _negatives(record: bytes, where: str) -> dict[str, str]:
    """The tasks that are known → false captions. Raises BadSource: of another shape."""
    try:
        content = json.loads(record)
        found = (content.get("negatives") if isinstance(content, dict) else None) or {}
        return {task: normalise(found[task]) for task in TASKS if task in dict(found)}
    except (ValueError, TypeError, BadCaption) as error:
        raise BadSource(
            f"{where}: its negatives are not one false caption by task ({error}); such shards are made by lift-data "
            "shapes"
        ) from None
