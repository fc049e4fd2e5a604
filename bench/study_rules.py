"""What `bench/study.yaml` says, as runs: which there are, which are done, and by what learning rate."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from lift_cache.errors import BadConfig, BadSource
from lift_cache.files import write_atomic
from lift_trainer.data.paraphrases import VERSION
from lift_trainer.evaluators.shapes import SPLITS, TASKS

Scores = dict[str, dict[str, dict[str, float]]]
"""Split → variant → task → accuracy."""


class Comparison(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    claim: str
    arm: str
    over: str
    variant: str


class Preview(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    arms: list[str]
    learning_rate: float


class Study(BaseModel):
    """Content of study.yaml, which says what each field is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: dict[str, dict[str, int]]
    training: dict[str, Any]
    score_every: int
    learning_rates: list[float]
    seeds: list[int]
    arms: dict[str, dict[str, Any]]
    first: int
    families: dict[str, list[str]]
    comparisons: list[Comparison]
    amortised_over: list[int]
    preview: Preview

    @classmethod
    def read(cls, path: Path) -> Study:
        """Raises BadConfig."""
        try:
            return cls.model_validate(yaml.safe_load(path.read_text()))
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{part}: " for part in first["loc"])
            raise BadConfig(f"{path}: {where}{first['msg']}") from None
        except (OSError, yaml.YAMLError) as error:
            raise BadConfig(f"{path}: {' '.join(str(error).split())}") from None

    @property
    def steps(self) -> int:
        return int(self.training["steps"])

    def named(self, name: str) -> list[str]:
        """The arms of a family, or the arm of that name."""
        return self.families.get(name, [name])

    @model_validator(mode="after")
    def _every_name_is_an_arm(self) -> Study:
        names = [
            *self.families,
            *self.preview.arms,
            *(side for c in self.comparisons for side in (c.arm, c.over)),
        ]
        for arm in (arm for name in names for arm in self.named(name)):
            if arm not in self.arms:
                raise ValueError(f"{arm}: no such arm")
        if self.steps % self.score_every:
            raise ValueError(f"score_every {self.score_every} does not divide the {self.steps} steps")
        return self


@dataclass(frozen=True)
class Run:
    """One training run: of the sweep on the validation data, or reported."""

    arm: str
    seed: int
    learning_rate: float
    data: str
    settings: dict[str, Any]
    """Everything that its scores depend on, but for what a cache holds."""

    @classmethod
    def of(cls, study: Study, arm: str, seed: int, learning_rate: float, data: str) -> Run:
        settings = {
            "training": {**study.training, **study.arms[arm], "lr": learning_rate, "seed": seed},
            "data": {"version": VERSION, **study.data[data]},
            "score_every": study.score_every,
        }
        return cls(arm, seed, learning_rate, data, settings)

    @property
    def name(self) -> str:
        return f"{self.arm}/{self.seed if self.data == 'reported' else f'lr{self.learning_rate:g}'}"

    @property
    def file(self) -> str:
        return f"{self.name.replace('/', '-' if self.data == 'validation' else '-seed')}.json"

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]


class Left(NamedTuple):
    """What is still to be run, and what for want of a learning rate cannot be told yet."""

    runs: list[Run]
    waiting: list[str]
    """Arms."""


@dataclass(frozen=True)
class Results:
    """The folder of JSONs."""

    folder: Path
    study: Study

    def get(self, run: Run) -> dict[str, Any] | None:
        """None where the run was not made. Raises BadConfig: made with other settings."""
        path = self.folder / run.file
        try:
            found = json.loads(path.read_bytes())
            digest = found["digest"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise BadSource(f"{path}: not a result of this study ({error!r}); remove it") from None
        if digest != run.digest:
            raise BadConfig(
                f"{path}: made with {_difference(found['settings'], run.settings)}; remove it, or put study.yaml back"
            )
        return dict(found)

    def require_one_recipe(self, arm: str, results: Sequence[Mapping[str, Any]]) -> None:
        """Raises BadSource where runs of an arm were trained on vectors that were made in two ways."""
        for one in results:
            if one["recipe"] != results[0]["recipe"]:
                raise BadSource(
                    f"{self.folder}: {one['run']} and {results[0]['run']} were trained on vectors of two recipes, "
                    f"{one['recipe']} and {results[0]['recipe']}; remove one of them and run it again"
                )

    def put(self, run: Run, result: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / run.file, (json.dumps(result) + "\n").encode())

    def sweep(self, arm: str) -> list[Run]:
        return [Run.of(self.study, arm, 0, rate, "validation") for rate in self.study.learning_rates]

    def validated(self, arm: str) -> tuple[float, float] | None:
        """The chosen learning rate and its validation score; None while the sweep is not done."""
        scored = [(run, self.get(run)) for run in self.sweep(arm)]
        if any(found is None for _, found in scored):
            return None
        own = "long" if self.study.arms[arm].get("caption_field") == "long" else "seen"
        best = max(scored, key=lambda pair: (composition(last(pair[1]), own), -pair[0].learning_rate))
        return best[0].learning_rate, composition(last(best[1]), own)

    def reported(self, arm: str) -> list[Run]:
        """One run per seed. Raises BadConfig while the sweep is not done."""
        chosen = self.validated(arm)
        if chosen is None:
            raise BadConfig(
                f"{arm}: its learning rate is chosen by the sweep, which is not done; run that first"
            )
        return [Run.of(self.study, arm, seed, chosen[0], "reported") for seed in self.study.seeds]

    def stages(self) -> Iterator[Left]:
        """What is left, in the order of running: each is told when the one before is done."""
        names = [*self.study.arms]
        for some in (names[: self.study.first], names[self.study.first :]):
            by_rate = zip(*(self.sweep(arm) for arm in some), strict=True)
            yield self._left(run for runs in by_rate for run in runs)
            ready = [arm for arm in some if self.validated(arm) is not None]
            by_seed = zip(*(self.reported(arm) for arm in ready), strict=True)
            left = self._left(run for runs in by_seed for run in runs)
            yield left._replace(waiting=[arm for arm in some if arm not in ready])

    def _left(self, runs: Iterator[Run]) -> Left:
        return Left([run for run in runs if self.get(run) is None], [])


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """`training.lr = 0.1 instead of 0.001`, of the first field that differs."""
    for part in ("training", "data"):
        then, now = theirs.get(part, {}), ours[part]
        for field in {**then, **now}:
            if then.get(field) != now.get(field):
                return f"{part}.{field} = {then.get(field)} instead of {now.get(field)}"
    return f"score_every = {theirs.get('score_every')} instead of {ours['score_every']}"


def last(result: Mapping[str, Any] | None) -> Scores:
    """Scores at the end of a run."""
    assert result is not None
    scores: Scores = result["curve"][-1]["scores"]
    return scores


def composition(scores: Scores, variant: str) -> float:
    """Mean over tasks and splits."""
    return statistics.fmean(scores[split][variant][task] for split in SPLITS for task in TASKS)
