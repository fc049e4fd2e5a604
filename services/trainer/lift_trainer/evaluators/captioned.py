"""Images with their captions: shards and tables as for training; COCO's JSON, Karpathy's, Flickr30k's CSV as published.

Order is that of the file: it says which captions are an image's first five, and which is its first.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from lift_cache.errors import BadCaption, BadSource
from lift_cache.keys import normalise
from lift_trainer.evaluators.images import ImageFiles, Images
from lift_trainer.rejects import Rejects
from lift_trainer.samples import build_index

FLICKR_COLUMNS = {"raw", "split", "filename"}
SPLIT = "test"
"""Of files that hold several."""


@dataclass(frozen=True)
class Captioned:
    """n images, each with at least one caption."""

    images: Images
    captions: Sequence[Sequence[str]]
    """Of each image, normalised, in order."""


def open_captioned(
    data: Sequence[str],
    rejects: Rejects,
    *,
    images: Path | None = None,
    image_field: str = "image",
    caption_field: Sequence[str] = (),
) -> Captioned:
    """Open a caption data set by its shape.

    Args:
        data: shards or tables as for `build_index`; or one file: COCO's `captions_*.json`, Karpathy's
            `dataset_*.json` or Flickr30k's CSV (columns raw, split, filename), of the latter two the test split.
        rejects: takes images and captions that cannot be used.
        images: folder of the images of a table or JSON; default: the file's own.

    Raises:
        BadSource: no such file or folder, of another shape, or nothing usable in it.
    """
    path = Path(data[0])
    if len(data) == 1 and path.suffix.lower() == ".json":
        return _from_files(path, images or path.parent, _json_captions(path), rejects)
    if len(data) == 1 and path.suffix.lower() == ".csv" and {*_header(path)} >= FLICKR_COLUMNS:
        return _from_files(path, images or path.parent, _flickr_captions(path), rejects)
    index = build_index(data, rejects, caption_fields=caption_field, images=images, image_field=image_field)
    texts = [*index.captions]
    pairs = index.pairs.tolist()
    return Captioned(
        index, [[texts[pair] for pair in pairs[start:stop]] for start, stop in pairwise(index.first.tolist())]
    )


def name_of(source: str) -> str:
    """`test` from data/test-{000..003}.tar: what tells results of one encoder apart."""
    if source.lower().endswith(".json"):
        return re.sub(r"[^\w.-]", "_", Path(source).stem)
    stem = re.match(r"[\w.-]*?(?=[-_.]*(?:\d*\.\w+)?$|[-_.]*[{*?\[])", Path(source).name)
    return (stem[0] if stem else "") or Path(source).resolve().parent.name


# ---------------------------------------------------------------------------------------------- JSON


class _CocoImage(BaseModel):
    id: int
    file_name: str


class _CocoCaption(BaseModel):
    image_id: int
    caption: str


class _Coco(BaseModel):
    images: list[_CocoImage]
    annotations: list[_CocoCaption]


class _Sentence(BaseModel):
    raw: str


class _KarpathyImage(BaseModel):
    filename: str
    filepath: str = ""
    """Folder, of COCO."""
    split: str
    sentences: list[_Sentence]


class _Karpathy(BaseModel):
    images: list[_KarpathyImage]


Captions = Iterable[tuple[str, Sequence[str]]]
"""(file of an image, its captions)."""


def _json_captions(path: Path) -> Captions:
    content = read_json(path)
    if isinstance(content, dict) and "annotations" not in content and "images" in content:
        found = of_shape(_Karpathy, content, path, "Karpathy's splits (images with split and sentences)")
        test = [image for image in found.images if image.split == SPLIT]
        if not test:
            raise BadSource(f"{path}: no image of it is of the split {SPLIT!r}")
        return [
            (str(Path(image.filepath, image.filename)), [sentence.raw for sentence in image.sentences])
            for image in test
        ]
    coco = of_shape(_Coco, content, path, "COCO's captions_*.json (images and annotations)")
    captions: dict[int, list[str]] = {image.id: [] for image in coco.images}
    for annotation in coco.annotations:
        if annotation.image_id not in captions:
            raise BadSource(
                f"{path}: a caption of image {annotation.image_id}, which is not among its images"
            )
        captions[annotation.image_id].append(annotation.caption)
    return [(image.file_name, captions[image.id]) for image in coco.images]


def read_json(path: Path) -> Any:
    """Raises BadSource: no such file, not JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise BadSource(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise BadSource(f"{path}: not JSON") from None


T = TypeVar("T")


def of_shape(shape: type[T], content: Any, path: Path, what: str) -> T:
    """Content as a type. Raises BadSource: of another shape; says where."""
    try:
        return TypeAdapter(shape).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise BadSource(f"{path} is not {what}: {field + ': ' if field else ''}{first['msg']}") from None


# ---------------------------------------------------------------------------------------------- Flickr30k


def _header(path: Path) -> list[str]:
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            return next(csv.reader(file), [])
    except OSError:
        return []  # `build_index` says it better
    except csv.Error:
        return []


def _flickr_captions(path: Path) -> Captions:
    """`raw` holds the captions as a JSON list."""
    found = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                if row["split"] != SPLIT:
                    continue
                try:
                    raw = json.loads(row["raw"] or "")
                except ValueError:
                    raw = None
                if not isinstance(raw, list) or not row["filename"]:
                    raise BadSource(
                        f"{path}: row {number}: raw is not a JSON list of captions, or no filename"
                    )
                found.append((row["filename"], raw))
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadSource(f"{path}: {error}") from None
    if not found:
        raise BadSource(f"{path}: no row of it is of the split {SPLIT!r}")
    return found


def _from_files(path: Path, folder: Path, rows: Captions, rejects: Rejects) -> Captioned:
    if not folder.is_dir():
        raise BadSource(f"{folder}: no such folder; name that of the images of {path} by --images")
    names, captions = [], []
    for name, texts in rows:
        usable = []
        for text in texts:
            try:
                usable.append(normalise(text))
            except BadCaption as error:
                rejects.add(f"{path}:{name}", str(error))
        if usable:
            names.append(name)
            captions.append(usable)
        elif not texts:
            rejects.add(f"{path}:{name}", "no caption")
    if not names:
        raise BadSource(f"{path}: no image with a caption in it")
    return Captioned(ImageFiles(folder, names), captions)
