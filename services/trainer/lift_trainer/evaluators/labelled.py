"""Images with a class each: a folder per class, as ImageNet's, or shards and tables with a field that names it.

They are an index like any other, with the class where the caption would be; so it is read, named in messages and
digested like any other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lift_cache.errors import BadCaption, BadConfig, BadSource
from lift_cache.keys import caption_keys, normalise
from lift_cache.sources import IMAGE_EXTENSIONS
from lift_trainer.index_file import Strings
from lift_trainer.rejects import Rejects
from lift_trainer.samples import Index, Source, build_index
from lift_trainer.shards import LocalShard

WORDNET = re.compile(r"n\d{8}")
"""Name of an ImageNet folder, which says nothing to a text encoder."""


@dataclass(frozen=True)
class Labelled:
    """n images of c classes."""

    index: Index
    """Its captions are what the data say of the class."""
    classes: tuple[str, ...]
    """In alphabetical order: another order of the files is the same task."""
    labels: np.ndarray
    """int64 [n]."""

    @classmethod
    def open(
        cls,
        data: Sequence[str],
        rejects: Rejects,
        *,
        label_field: str | None = None,
        label_pattern: str | None = None,
        images: Path | None = None,
        image_field: str = "image",
    ) -> Labelled:
        """
        Args:
            data: shards or tables, as for training, where `label_field` names the class; else folders with a folder
                per class.
            label_pattern: regular expression; of what the field says only its matches count, each once and sorted.
                `red|blue` makes "blue red" of "a red circle left of a blue square".
            images, image_field: for tables, see `build_index`.

        Raises:
            BadSource: no such data, none with an image, or an image without a class or with two.
            BadConfig: files without `label_field`, or a pattern that is none.
        """
        if label_field is None:
            index = _folders(data, rejects)
        else:
            fields = [label_field]
            index = build_index(data, rejects, caption_fields=fields, images=images, image_field=image_field)
        said = [*index.captions]
        if label_pattern is not None:
            said = _matches(said, label_pattern)
        return cls._of(index, said)

    @classmethod
    def _of(cls, index: Index, said: Sequence[str]) -> Labelled:
        """`said`: the class that each distinct caption of the index means."""
        classes = tuple(sorted(set(said)))
        number = {label: i for i, label in enumerate(classes)}
        of_pair = np.array([number[label] for label in said], np.int64)[index.pairs]
        labels = of_pair[index.first[:-1]]
        other = np.flatnonzero(of_pair != np.repeat(labels, np.diff(index.first)))
        if len(other):
            where = int(np.searchsorted(index.first, other[0], side="right")) - 1
            both = f"{classes[labels[where]]}, {classes[of_pair[other[0]]]}"
            raise BadSource(f"{index.where(where)} has two classes ({both}); it needs one")
        return cls(index, classes, labels)

    def take(self, samples: np.ndarray) -> Labelled:
        """Some of the images (int64 [k], ascending); the classes stay."""
        return Labelled(self.index.take(samples), self.classes, self.labels[samples])

    @property
    def digest(self) -> str:
        """Of images and classes, in order."""
        named = "\0".join([self.index.digest, *self.classes])
        return hashlib.blake2b(named.encode(), digest_size=16).hexdigest()


def _matches(said: Sequence[str], pattern: str) -> list[str]:
    """Raises BadConfig: not a regular expression. BadSource: none in one of the texts."""
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise BadConfig(f"--label-pattern {pattern}: {error}") from None
    found = []
    for text in said:
        words = sorted({match[0] for match in wanted.finditer(text)})
        if not words:
            raise BadSource(f"{text[:80]!r} has nothing of --label-pattern {pattern}, so no class")
        found.append(" ".join(words))
    return found


def _folders(data: Sequence[str], rejects: Rejects) -> Index:
    """All images under `DATA/CLASS/`, at any depth, in alphabetical order. Raises BadSource, BadConfig."""
    sources, file, names, sizes, labels = [], [], [], [], []
    classes: dict[str, int] = {}
    for root in map(Path, data):
        if not root.exists():
            raise BadSource(f"{root}: no such folder; shards and tables need --label-field")
        if not root.is_dir():
            raise BadConfig(
                f"{root} is a file: name the field of its samples that holds their class by --label-field, or give "
                "a folder with a folder per class"
            )
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not folders:
            raise BadSource(f"{root}: no folder in it; it needs one per class, with the images of that class")
        sources.append(Source(LocalShard(root), root))
        for folder in folders:
            try:
                label = classes.setdefault(normalise(folder.name), len(classes))
            except BadCaption as error:
                raise BadSource(f"{folder}: {error}") from None
            for path in _files(folder):
                if path.suffix.lower().removeprefix(".") not in IMAGE_EXTENSIONS:
                    rejects.add(str(path), "no image, by its name")
                    continue
                try:
                    size = path.stat().st_size
                except OSError as error:  # a link to nowhere
                    rejects.add(str(path), error.strerror or str(error))
                    continue
                file.append(len(sources) - 1)
                names.append(str(path.relative_to(root)))
                sizes.append(size)
                labels.append(label)
    if not names:
        raise BadSource(f"{', '.join(data)}: no image in any folder of it")
    return Index(
        sources=sources,
        file=np.array(file, np.int32),
        offset=np.zeros(len(names), np.int64),
        size=np.array(sizes, np.int64),
        names=Strings.of(names),
        first=np.arange(len(names) + 1),
        pairs=np.array(labels, np.int64),
        captions=Strings.of([*classes]),
        keys=caption_keys([*classes]),
        field_of_pair=np.zeros(len(names), np.uint8),
    )


def _files(folder: Path) -> list[Path]:
    """Files at any depth, without hidden ones. Raises BadSource: a folder that cannot be read."""

    def refuse(error: OSError) -> None:
        raise BadSource(f"{error.filename}: {error.strerror or error}")

    found = []
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(where, name) for name in sorted(names) if not name.startswith(".")]
    return found


def read_class_names(path: Path) -> dict[str, str]:
    """What classes are called, by what the data call them; underscores are spaces.

    JSON, either {"0": ["n01440764", "tench"], …} as ImageNet's `imagenet_class_index.json` or {"n01440764": "tench"};
    or text, one class a line: `n01440764 tench`.

    Raises:
        BadSource: of another shape, or a class that is named twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        pairs = (
            _json_names(path, json.loads(text)) if path.suffix.lower() == ".json" else _text_names(path, text)
        )
    except OSError as error:
        raise BadSource(f"--classes {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise BadSource(f"--classes {path}: {str(error).splitlines()[0]}; is it UTF-8, and whole?") from None
    names: dict[str, str] = {}
    for label, name in pairs:
        if names.setdefault(label, name) != name:
            raise BadSource(f"--classes {path}: {label} is {names[label]!r} and {name!r}; name it once")
    return names


def _json_names(path: Path, content: object) -> list[tuple[str, str]]:
    pairs = []
    for key, value in content.items() if isinstance(content, dict) else [("", None)]:
        match value:
            case str(name):
                pairs.append((key, name))
            case [str(label), str(name)]:
                pairs.append((label, name))
            case _:
                raise BadSource(
                    f'--classes {path}: of another shape; write {{"n01440764": "tench"}} or '
                    '{"0": ["n01440764", "tench"]}'
                )
    return [(label, _spaced(name)) for label, name in pairs]


def _text_names(path: Path, text: str) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        label, _, name = line.strip().partition("\t" if "\t" in line else " ")
        if label and not name.strip():
            raise BadSource(
                f"--classes {path}:{number}: {label} has no name; write one class a line: LABEL NAME"
            )
        if label:
            pairs.append((label, _spaced(name)))
    return pairs


def _spaced(name: str) -> str:
    return " ".join(name.replace("_", " ").split())


def class_names(classes: Sequence[str], given: Path | None) -> list[str]:
    """A name for each class: from the file, else what the data call it.

    Raises:
        BadSource: one has none, in the file or because it is only a WordNet number.
    """
    names = read_class_names(given) if given else {}
    found = []
    for label in classes:
        if given is None and WORDNET.fullmatch(label):
            raise BadSource(
                f"class {label} has no name, only a number; give --classes FILE, such as imagenet_class_index.json"
            )
        name = names.get(label, "") if given else _spaced(label)
        if not name:
            raise BadSource(f"class {label!r} has no name in {given}; add it")
        found.append(name)
    return found
