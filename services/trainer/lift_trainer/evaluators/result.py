"""What an evaluation says, in a form in which two of them can be compared item by item.

A score is a mean over items (or over the means of groups of items, such as classes or tasks), and every item belongs
to an image. Intervals come from resampling images (`intervals`), differences of two encoders from pairing their items
(`compare`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from lift_cache.errors import BadSource
from lift_cache.files import write_atomic
from lift_trainer.evaluators.intervals import intervals
from lift_trainer.evaluators.items import Items, mean

VERSION = 1


def stem(task: str, name: str, protocol: str) -> str:
    """TASK-NAME-PROTOCOL: of the file, and of what tells apart the results of one encoder."""
    return f"{task}-{name}-{protocol}"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Subject(_Frozen):
    """Whose result it is."""

    name: str
    checkpoint: str
    step: int | None = None
    snapshot: str | None = None
    recipe: str | None = None
    """Fingerprint."""
    text_control: str = "none"
    text_transform: str = "none"


class Score(_Frozen):
    value: FiniteFloat
    items: int
    chance: float | None = None
    low: float | None = None
    high: float | None = None
    """95 % interval, images resampled; None over fewer than two images."""
    blind: float | None = None
    """The same choices made for the mean training image instead of each image."""


class Result(_Frozen):
    """Content of `eval/TASK-NAME-PROTOCOL.json`."""

    version: int = VERSION
    task: str
    protocol: str
    """Which rules of the task: part of every score, and never mixed in one column."""
    name: str
    """Of the data, for people."""
    data: str
    """Digest of the items in their order: only results on equal items are paired."""
    subject: Subject
    scores: dict[str, Score]
    items: dict[str, Items]
    """By score; derived scores may have none."""
    left_out: dict[str, str] = {}
    """Image or row → why."""
    details: dict[str, Any] = {}
    """What only this task knows: ties, gallery, distances."""

    @property
    def stem(self) -> str:
        """See `stem`."""
        return stem(self.task, self.name, self.protocol)

    def write(self, directory: Path) -> Path:
        """Write `DIRECTORY/TASK-NAME-PROTOCOL.json`. Raises CacheFull, StorageFailed."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.stem}.json"
        # Not pydantic's JSON, which has no way to write the name of a file that is not UTF-8.
        write_atomic(path, (json.dumps(self.model_dump(), separators=(",", ":")) + "\n").encode())
        return path

    @classmethod
    def read(cls, path: Path) -> Result:
        """Raises BadSource: no such file, torn, of another version."""
        try:
            return cls.model_validate(json.loads(path.read_bytes()))
        except OSError as error:
            raise BadSource(f"{path}: {error.strerror or error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise BadSource(f"{path}: {field}: {first['msg']}; evaluate again with this version") from None
        except (ValueError, RecursionError):
            raise BadSource(f"{path}: not JSON; evaluate again") from None


def scored(
    items: Mapping[str, Items],
    *,
    chance: Mapping[str, float] | None = None,
    blind: Mapping[str, float] | None = None,
) -> dict[str, Score]:
    """The scores of items, by name, with what is known beside them; none of a name without items."""
    between = intervals(items)
    return {
        name: Score(
            value=mean(some),
            items=len(some.value),
            chance=(chance or {}).get(name),
            low=between[name].low if name in between else None,
            high=between[name].high if name in between else None,
            blind=(blind or {}).get(name),
        )
        for name, some in items.items()
        if some.value
    }
