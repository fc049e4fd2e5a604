"""The record of a run: `state.json` of its checkpoints, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from lift_cache.errors import BadConfig, UnsupportedFormat
from lift_cache.recipe import Recipe
from lift_trainer.config import TrainConfig

STATE, STATE_VERSION = "state.json", 2


class TextState(BaseModel):
    """Where the text vectors of a run come from: one cache, or a control without one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    snapshot: str | None
    """Of an aligned export: the snapshot that it was made from."""
    recipe: Recipe | None
    overlay_digest: str | None
    """Of the vectors that came from the embedder."""
    dimensions: int
    """Width after the transform."""


class State(BaseModel):
    """What a run needs to go on, beside its tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[2] = 2
    step: int
    """Steps done."""
    total_steps: int
    config: TrainConfig
    index_digest: str
    texts: tuple[TextState, ...]
    """One per cache; none where a text transformer is trained."""
    bad: dict[str, str]
    """Broken samples met so far: place → reason."""
    libraries: dict[str, str]
    """Versions; that of lift-trainer with the commit, where it runs from a checkout; device and number of devices."""
    files: dict[str, str] = {}
    """Name → BLAKE2b-128 of the files beside this one."""

    @property
    def recipe(self) -> Recipe | None:
        """Of the first cache: the one with which a run is evaluated."""
        return self.texts[0].recipe if self.texts else None

    @property
    def snapshot(self) -> str | None:
        """Of the first cache."""
        return self.texts[0].snapshot if self.texts else None


def as_current(path: Path, written: dict[str, Any]) -> dict[str, Any]:
    """A state file as this version has it, changed in place. Version 1 had one cache, and its fields beside the others.

    Raises:
        UnsupportedFormat: a newer version.
        LookupError, TypeError: torn.
    """
    if isinstance(written["version"], int) and written["version"] > STATE_VERSION:
        raise UnsupportedFormat(
            f"{path} has checkpoint version {written['version']}; this software reads {STATE_VERSION}: update it"
        )
    if written["version"] == 1:
        text = {field: written.pop(field) for field in ("snapshot", "recipe", "overlay_digest")}
        written |= {"version": 2, "texts": [text | {"dimensions": written.pop("text_dimensions")}]}
    return written


def read_record(path: Path) -> State:
    """The record of a run (its newest checkpoint), of one checkpoint, or in a copy of `state.json`.

    Raises:
        BadConfig: there is none, or it is torn.
        UnsupportedFormat: of a newer version.
    """
    file = path
    if path.is_dir():
        try:
            file = path / "checkpoints" / (path / "checkpoints" / "latest").read_text().strip() / STATE
        except OSError:
            file = path / STATE
    try:
        return State.model_validate(as_current(file, json.loads(file.read_bytes())))
    except OSError as error:
        raise BadConfig(f"{path} has no record of a run ({file}: {error.strerror})") from None
    except (ValueError, LookupError, TypeError) as error:
        raise BadConfig(f"{file} is not the record of a run: {str(error).splitlines()[0]}") from None
