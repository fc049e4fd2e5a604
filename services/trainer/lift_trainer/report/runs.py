"""A run directory, read into types: what was configured, what was logged, what the evaluation said."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError, field_validator

from lift_cache.errors import BadSource, LiftError
from lift_cache.recipe import Recipe
from lift_cache.snapshot import Manifest, find_snapshot, load_manifest, split_location
from lift_trainer.evaluators.result import Result
from lift_trainer.record import as_current


class _Lenient(BaseModel):
    """Only what the page shows; files may hold more."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Point(_Lenient):
    step: int
    samples: int
    loss: FiniteFloat
    time_s: float


class HeldOutScores(_Lenient):
    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    loss: FiniteFloat
    image_to_text: float | None = Field(None, alias="r@1_image_to_text")
    text_to_image: float | None = Field(None, alias="r@1_text_to_image")


class HeldOutPoint(_Lenient):
    step: int
    held_out: HeldOutScores


class Config(_Lenient):
    """The settings that the page reads; all of them are shown."""

    cache: tuple[str, ...] = ()
    tower: str
    text_tower: str = "cached"
    image_size: int
    loss: str
    mask: str = "none"
    batch_size: int
    seed: int = 0
    text_transform: str = "none"
    text_control: str = "none"

    @field_validator("cache", mode="before")
    @classmethod
    def _once_there_was_one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value or ()


class Text(_Lenient):
    """Of one cache."""

    snapshot: str | None = None
    recipe: Recipe | None = None
    dimensions: int | None = None
    """Width after the transform."""


class State(_Lenient):
    """Of the newest checkpoint."""

    step: int
    total_steps: int
    texts: tuple[Text, ...] = ()
    libraries: dict[str, str] = {}

    @property
    def snapshot(self) -> str | None:
        """Of the first cache."""
        return self.texts[0].snapshot if self.texts else None

    @property
    def recipe(self) -> Recipe | None:
        """Of the first cache."""
        return self.texts[0].recipe if self.texts else None


class FillSummary(_Lenient):
    """What `lift-embed fill --summary` wrote."""

    rows: int
    captions: int
    unique: int
    cached: int
    embedded: int
    tokens: int
    truncated: int
    rejected: int
    seconds: float


_POINT: TypeAdapter[Point | HeldOutPoint] = TypeAdapter(Point | HeldOutPoint)


@dataclass(frozen=True)
class Evaluated:
    """What has results: a training run, or a released file, of which nothing else is known."""

    name: str
    path: Path
    results: tuple[Result, ...]
    """By the names of their files."""


@dataclass(frozen=True)
class Run(Evaluated):
    config: Config
    settings: dict[str, Any]
    """All of `config.json`, for the table."""
    state: State
    checkpoint: Path
    """The newest one, which the state is of."""
    points: tuple[Point, ...]
    held_out: tuple[HeldOutPoint, ...]
    """Scored while training, where that was asked for."""

    @property
    def samples(self) -> int:
        """Images that the newest checkpoint has seen, each time counted."""
        return self.state.step * self.config.batch_size

    @property
    def seconds(self) -> float:
        """Time in training; each continuation of a stopped run counts from zero again."""
        times = [point.time_s for point in self.points]
        return sum(now for now, later in pairwise([*times, 0.0]) if later < now)


@dataclass(frozen=True)
class CacheCard:
    path: Path
    """Where it lies now."""
    snapshot: str
    manifest: Manifest

    @property
    def bytes(self) -> int:
        return sum(segment.size for segment in self.manifest.segments)


def named(argument: str) -> tuple[str, Path]:
    """`DIR` or `NAME=DIR` → what to call it, and the folder."""
    name, equals, folder = argument.partition("=")
    if not equals or Path(argument).is_dir():
        name, folder = "", argument
    return name or Path(folder).resolve().name, Path(folder)


def open_evaluated(argument: str) -> Evaluated:
    """`DIR` or `NAME=DIR`. Raises `BadSource`: no run there, nothing evaluated, a file of another shape."""
    name, path = named(argument)
    if not (path / "config.json").is_file():
        if path.suffix == ".eval" and (found := sorted(path.glob("*.json"))):
            return Evaluated(name.removesuffix(".eval"), path, tuple(map(Result.read, found)))
        raise BadSource(
            f"{path} is no training run (no config.json); name the folder given to lift-train --run"
        )
    found = sorted((path / "eval").glob("*.json"))
    if not found:
        raise BadSource(f"{path} has no evaluation; first: lift-eval retrieval --run {path} --data SHARDS")
    settings = _json(path / "config.json")
    checkpoint, state = _newest(path)
    points, held_out = _points(path / "metrics.jsonl")
    return Run(
        name=name,
        path=path,
        config=_parse(Config, settings, path / "config.json"),
        settings=settings,
        state=state,
        checkpoint=checkpoint,
        points=points,
        held_out=held_out,
        results=tuple(map(Result.read, found)),
    )


def open_all(arguments: Sequence[str]) -> list[Evaluated]:
    """As `open_evaluated`, under names that tell them apart."""
    found = [open_evaluated(argument) for argument in arguments]
    times = Counter(one.name for one in found)
    return [replace(one, name=str(one.path)) if times[one.name] > 1 else one for one in found]


def open_cache(location: str) -> CacheCard:
    """`PATH` or `PATH@ID`. Raises `CacheNotFound`, `CacheDamaged`."""
    path, wanted = split_location(location)
    snapshot = find_snapshot(path, wanted)
    return CacheCard(path, snapshot, load_manifest(path, snapshot))


def cache_of(run: Evaluated) -> CacheCard | None:
    """The snapshot that a run was trained on; None when it used none or the cache lies elsewhere now."""
    if not isinstance(run, Run) or not run.config.cache or run.state.snapshot is None:
        return None
    path, _ = split_location(run.config.cache[0])
    try:
        return open_cache(f"{path}@{run.state.snapshot}")
    except LiftError:
        return None


def open_fill_summary(path: Path) -> FillSummary:
    return _parse(FillSummary, _json(path), path)


def _newest(run: Path) -> tuple[Path, State]:
    latest = run / "checkpoints" / "latest"
    try:
        name = latest.read_text().strip()
    except OSError:
        raise BadSource(f"{run} has no checkpoint; the same lift-train command makes one") from None
    checkpoint = run / "checkpoints" / Path(name).name
    path = checkpoint / "state.json"
    written = _json(path)
    try:
        return checkpoint, _parse(State, as_current(path, written), path)
    except (LookupError, TypeError):
        raise BadSource(f"{path}: no version in it; torn?") from None


def _points(path: Path) -> tuple[tuple[Point, ...], tuple[HeldOutPoint, ...]]:
    """Logged steps and held-out ones; a last line that was cut off, or a loss that is not finite, draws nothing."""
    points: list[Point] = []
    held_out: list[HeldOutPoint] = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise BadSource(f"{path}: {error.strerror}") from None
    for line in lines:
        try:
            point = _POINT.validate_json(line)
        except ValidationError:
            continue
        if isinstance(point, HeldOutPoint):
            held_out.append(point)
        else:
            points.append(point)
    return tuple(points), tuple(held_out)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise BadSource(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise BadSource(f"{path}: not JSON; make it again") from None
    if not isinstance(content, dict):
        raise BadSource(f"{path}: not a JSON object; make it again")
    return content


T = TypeVar("T", bound=BaseModel)


def _parse(model: type[T], content: dict[str, Any], path: Path) -> T:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise BadSource(f"{path}: {field}: {first['msg']}; made by another version?") from None
