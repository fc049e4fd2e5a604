"""SugarCrepe (Hsieh et al. 2023): an image of COCO val2017, its caption, and a fluent caption that is false.

add_att.json …    {"0": {"filename": "000000085329.jpg", "caption": …, "negative_caption": …}, …}
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from lift_cache.errors import BadCaption, BadSource
from lift_cache.keys import normalise
from lift_trainer.evaluators.captioned import of_shape, read_json
from lift_trainer.evaluators.hard_negatives import Choice, HardNegatives
from lift_trainer.evaluators.images import ImageFiles

TASKS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


class _Item(BaseModel):
    filename: str
    caption: str
    negative_caption: str


def open_sugarcrepe(folder: Path, images: Path, name: str, *, max_bad: int = 100) -> HardNegatives:
    """Read the seven files.

    Args:
        images: folder of COCO val2017.

    Raises:
        BadSource: a file is missing, empty or of another shape, there is no folder of images, an empty caption.
    """
    if not images.is_dir():
        raise BadSource(f"{images}: no such folder; --images names the folder of COCO val2017")
    number: dict[str, int] = {}
    choices: dict[str, list[Choice]] = {}
    for task in TASKS:
        path = folder / f"{task}.json"
        items = of_shape(
            dict[str, _Item],
            read_json(path),
            path,
            "a task of SugarCrepe (filename, caption, negative_caption)",
        )
        if not items:
            raise BadSource(f"{path}: no item in it")
        choices[task] = [_choice(path, key, item, number) for key, item in items.items()]
    return HardNegatives("sugarcrepe", name, ImageFiles(images, [*number]), choices, max_bad=max_bad)


def _choice(path: Path, key: str, item: _Item, number: dict[str, int]) -> Choice:
    try:
        caption, negative = normalise(item.caption), normalise(item.negative_caption)
    except BadCaption as error:
        raise BadSource(f"{path}: item {key}: {error}") from None
    return Choice(number.setdefault(item.filename, len(number)), caption, negative)
