"""Does a fixed text encoder beat joint training at composition and long captions, for less compute?

    make study         four arms, one seed, in at most half an hour: a preview
    make study-full    all of bench/study.yaml

`bench/study.yaml` fixes arms, learning rates, metrics and rules; this file only runs it. Every run leaves one JSON in
`--results`, and a run whose JSON is there is not run again, so the study can be made in parts, on several days:

    python bench/study.py run --list                           what is left, in order
    python bench/study.py run --only lift-smollm2-center/0     one arm and seed (lr0.001 in its place: of the sweep)
    python bench/study.py run                                  everything, two at a time
    python bench/study.py report                               tables, verdicts and the figure of what is there

A JSON that was made with other settings than study.yaml's is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import arms  # noqa: F401 - first: it settles how threads wait
import torch
import yaml
from cyclopts import App, Parameter
from pydantic import BaseModel, ConfigDict, ValidationError
from reporting import machine

from lift_cache.errors import BadConfig, BadSource, LiftError
from lift_cache.files import write_atomic
from lift_cache.sources import read_member, scan_tar
from lift_cache.tools.costs import ENCODERS
from lift_trainer.checkpoint import checkpoint_path, read_checkpoint
from lift_trainer.config import TextShape, TrainConfig
from lift_trainer.data.paraphrases import VARIANTS, VERSION
from lift_trainer.evaluators.shapes import SPLITS, TASKS
from lift_trainer.evaluators.trained import TrainedRun
from lift_trainer.flops import contrast_flops, image_flops, text_flops
from lift_trainer.images import center_view, decode
from lift_trainer.job import Job, prepare
from lift_trainer.loop import train
from lift_trainer.samples import captions_only
from lift_trainer.text import CachedText, TokenText

HERE = Path(__file__).resolve().parent

MOST_PIXELS = 1 << 20

Scores = dict[str, dict[str, dict[str, float]]]
"""Split → variant → task → accuracy."""

app = App(help=__doc__, help_format="plaintext")


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
        except (OSError, yaml.YAMLError, ValidationError) as error:
            raise BadConfig(f"{path}: {error}") from None

    @property
    def steps(self) -> int:
        return int(self.training["steps"])


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
    waiting: int


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
            raise BadConfig(f"{arm}: its learning rate is chosen by the sweep, which is not done; run that first")
        return [Run.of(self.study, arm, seed, chosen[0], "reported") for seed in self.study.seeds]

    def stages(self) -> Iterator[Left]:
        """What is left, in the order of running: each is told when the one before is done."""
        names = [*self.study.arms]
        for some in (names[: self.study.first], names[self.study.first :]):
            by_rate = zip(*(self.sweep(arm) for arm in some), strict=True)
            yield self._left(run for runs in by_rate for run in runs)
            if any(self.validated(arm) is None for arm in some):
                yield Left([], len(some) * len(self.study.seeds))
            else:
                by_seed = zip(*(self.reported(arm) for arm in some), strict=True)
                yield self._left(run for runs in by_seed for run in runs)

    def _left(self, runs: Iterator[Run]) -> Left:
        return Left([run for run in runs if self.get(run) is None], 0)


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


# --------------------------------------------------------------------------------------------- a run


class Question(NamedTuple):
    own: str
    false: dict[str, str]
    """Task → caption."""


@dataclass(frozen=True)
class Quiz:
    """The pictures of one split, and what is asked about them in each variant."""

    views: torch.Tensor
    """uint8 [n, 3, S, S]."""
    questions: dict[str, list[Question]]

    @classmethod
    def read(cls, data: Path, split: str, size: int) -> Quiz:
        """Raises BadSource."""
        questions: dict[str, list[Question]] = {}
        views = torch.empty(0)
        for variant in VARIANTS:
            path = data / f"{split}-{variant}-000.tar"
            if not path.is_file():
                raise BadSource(f"{path}: not there; make it with lift-data paraphrases {data}")
            with path.open("rb") as file:
                samples = list(scan_tar(path))
                if variant == VARIANTS[0]:  # the same pictures in all
                    pngs = [read_member(file, one.members["png"]) for one in samples]
                    views = torch.stack([center_view(decode(png, MOST_PIXELS), size) for png in pngs])
                records = [json.loads(read_member(file, one.members["json"])) for one in samples]
            questions[variant] = [
                Question(record["captions"][0], record["negatives"]) for record in records
            ]
        return cls(views, questions)


def answered(
    trained: TrainedRun, quizzes: Mapping[str, Quiz], mean_image: torch.Tensor | None = None
) -> Scores:
    """Two-way accuracies of a checkpoint, a tie being wrong, as `lift_trainer.evaluators` have them.

    A variant that a text transformer would cut off is left out.

    Args:
        mean_image: float32 [D], which answers in the place of every picture.
    """
    scores: Scores = {}
    for split, quiz in quizzes.items():
        if mean_image is None:
            x_nd = torch.cat([trained.embed_images(views) for views in quiz.views.split(256)])
        else:
            x_nd = mean_image.expand(len(quiz.views), -1)
        scores[split] = {}
        for variant, questions in quiz.questions.items():
            texts = sorted({text for own, false in questions for text in (own, *false.values())})
            number = {text: i for i, text in enumerate(texts)}
            if trained.model.joint:
                context = TextShape.parse(trained.checkpoint.state.config.text_shape).context
                if TokenText(captions_only(texts).captions, context).truncated()[0]:
                    continue
            y_ud = trained.embed_texts(texts)

            def cosines(chosen: list[str], x_nd=x_nd, y_ud=y_ud, number=number) -> torch.Tensor:  # type: ignore[no-untyped-def]
                return (x_nd * y_ud[[number[text] for text in chosen]]).sum(1)

            own_n = cosines([question.own for question in questions])
            scores[split][variant] = {
                task: (own_n > cosines([question.false[task] for question in questions])).double().mean().item()
                for task in TASKS
            }
    return scores


def opened(run: Path, step: int) -> TrainedRun:
    """A run as it was after a step."""
    return TrainedRun.open(run, "cpu", checkpoint=read_checkpoint(checkpoint_path(run, step)))


def flops(job: Job) -> dict[str, float]:
    """`step`: of one training step, both passes; `embedding`: of embedding the training captions, once."""
    model, batch = job.model, job.config.batch_size
    text = model.texts[0]
    image = (
        image_flops(model.tower, job.config.image_size)
        + text_flops(text)
        + contrast_flops(batch, text.dimensions, texts_train=text.trains)
    )
    embedding = 0.0
    if isinstance(job.texts[0], CachedText):
        encoder = ENCODERS[job.texts[0].reader.recipe.model].shape
        embedding = encoder.flops(job.texts[0].reader.tokens(job.texts[0].rows)).sum()
    return {"step": image.step * batch, "embedding": float(embedding)}


def config_of(run: Run, inputs: Path, where: Path, **changed: Any) -> TrainConfig:
    """Of a run in `where`; caches and data lie in `inputs`."""
    settings = {**run.settings["training"], **changed}
    if "cache" in settings:
        settings["cache"] = str(inputs / settings["cache"])
    if "caption_field" in settings:
        settings["caption_field"] = [settings["caption_field"]]
    every = run.settings["score_every"]
    return TrainConfig.model_validate(
        {
            "data": [str(inputs / run.data / "train-*.tar")],
            "run": where,
            "tensorboard": False,
            "log_every": every,
            "checkpoint_every": every,
            "keep": settings["steps"] // every + 1,
            **settings,
        }
    )


def perform(run: Run, inputs: Path, scratch: Path) -> dict[str, Any]:
    """Train and score; a run that was cut off goes on at its checkpoint."""
    where = scratch / run.file.removesuffix(".json")
    config = config_of(run, inputs, where)
    began = time.process_time()
    job = prepare(config)
    counted = flops(job)
    if not train(job).finished:
        raise KeyboardInterrupt
    quizzes = {split: Quiz.read(inputs / run.data, split, config.image_size) for split in SPLITS}
    every = run.settings["score_every"]
    curve = [
        {"step": step, "scores": answered(opened(where, step), quizzes)}
        for step in range(every, config.steps + 1, every)  # type: ignore[operator]
    ]
    end = opened(where, config.steps)  # type: ignore[arg-type]
    lines = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
    recipe = job.origins[0].recipe if job.origins else None
    result = {
        "run": run.name,
        "digest": run.digest,
        "settings": run.settings,
        "recipe": recipe.fingerprint if recipe else None,
        "parameters": sum(p.numel() for p in job.model.parameters()),
        "flops": counted,
        "curve": curve,
        "blind": answered(end, quizzes, end.mean_image()),
        "loss": [[line["step"], line["loss"]] for line in lines],
        "cpu_seconds": round(time.process_time() - began, 1),
        "made_with": machine("torch", "timm", "lift-trainer"),
    }
    shutil.rmtree(where)
    return result


# --------------------------------------------------------------------------------------------- commands

Inputs = Annotated[Path, Parameter(help="Folder with data (`reported`, `validation`) and caches, as make study makes it.")]
At = Annotated[Path, Parameter(help="Folder of the JSONs.")]
Rules = Annotated[Path, Parameter(help="What to compare.")]


@app.command
def run(
    *,
    inputs: Inputs = Path("runs/study"),
    results: At = HERE / "results" / "study",
    study: Rules = HERE / "study.yaml",
    only: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    list_runs: Annotated[bool, Parameter(name="--list", negative=())] = False,
    at_once: int = 2,
) -> None:
    """Make all runs that are left, saying first how many hours they take.

    Parameters
    ----------
    only
        ARM/SEED, or ARM/lrRATE of the sweep; may be given several times.
    list_runs
        Name the runs that are left and can be made now, and stop.
    at_once
        Processes, each on one thread.
    """
    rules = Study.read(study)
    kept = Results(results, rules)
    if list_runs:
        stage = next((stage for stage in kept.stages() if stage.runs), Left([], 0))
        print("".join(f"{one.name}\n" for one in stage.runs), end="")
        return
    if only:
        for name in only:
            _make(_named(kept, name), kept, inputs)
        return
    _say_hours(kept, inputs, at_once)
    for stage in kept.stages():
        _all_at_once(stage.runs, ["--inputs", inputs, "--results", results, "--study", study], at_once)


@app.command
def preview(
    *,
    inputs: Inputs = Path("runs/study"),
    results: At = Path("runs/study/preview"),
    study: Rules = HERE / "study.yaml",
) -> None:
    """Four arms, one seed, one learning rate for all: shows how the study works, and proves nothing."""
    rules = Study.read(study)
    kept = Results(results, rules)
    print(PREVIEW, flush=True)
    made = {}
    for arm in rules.preview.arms:
        one = Run.of(rules, arm, 0, rules.preview.learning_rate, "reported")
        _make(one, kept, inputs)
        made[arm] = [kept.get(one)]
    print(f"\n{PREVIEW}")


PREVIEW = (
    "PREVIEW: one seed, and one learning rate that nobody tuned. Nothing here may be quoted; make study-full is the study."
)


def _named(kept: Results, name: str) -> Run:
    """Raises BadConfig: no such run, or its learning rate is not chosen yet."""
    arm, _, which = name.rpartition("/")
    if arm not in kept.study.arms:
        raise BadConfig(f"--only {name}: no such arm; there are {', '.join(kept.study.arms)}")
    runs = kept.sweep(arm) if which.startswith("lr") else kept.reported(arm)
    found = next((one for one in runs if one.name == name), None)
    if found is None:
        raise BadConfig(f"--only {name}: there are {', '.join(one.name for one in runs)}")
    return found


def _make(one: Run, kept: Results, inputs: Path) -> None:
    if kept.get(one) is not None:
        print(f"{one.name}: done before", flush=True)
        return
    result = perform(one, inputs, inputs / "runs")
    kept.put(one, result)
    own = "long" if "caption_field" in kept.study.arms[one.arm] else "seen"
    print(
        f"{one.name}: composition {composition(last(result), own):.1%} ({own}), {result['cpu_seconds']:.0f} CPU s",
        flush=True,
    )


def _all_at_once(runs: Sequence[Run], flags: Sequence[object], at_once: int) -> None:
    """Each run in a process of its own. Raises LiftError at the end where one failed."""

    def one(run: Run) -> int:
        command = [sys.executable, __file__, "run", "--only", run.name, *flags]
        return subprocess.run([str(word) for word in command], check=False).returncode

    with ThreadPoolExecutor(at_once) as pool:
        codes = list(pool.map(one, runs))
    failed = [run.name for run, code in zip(runs, codes, strict=True) if code]
    if failed:
        raise LiftError(f"{', '.join(failed)}: not finished (see above); the same command goes on")


def _say_hours(kept: Results, inputs: Path, at_once: int) -> None:
    stages = list(kept.stages())
    left = [run for stage in stages for run in stage.runs]
    waiting = sum(stage.waiting for stage in stages)
    if not left and not waiting:
        print("nothing is left to run")
        return
    kinds = {arm: json.dumps([settings.get("text_shape"), settings.get("caption_field")]) for arm, settings in kept.study.arms.items()}
    seconds: dict[str, float] = {}
    for arm, kind in kinds.items():
        if kind not in seconds:
            seconds[kind] = _rehearsed(Run.of(kept.study, arm, 0, kept.study.learning_rates[0], "reported"), inputs)
    names = [*kept.study.arms]
    total = sum(seconds[kinds[run.arm]] for run in left)
    if waiting:
        for some, stage in zip((names[: kept.study.first], names[kept.study.first :]), stages[1::2], strict=True):
            if stage.waiting:
                total += len(kept.study.seeds) * sum(seconds[kinds[arm]] for arm in some)
    print(
        f"{len(left) + waiting} runs are left, about {total / 3600 / at_once:.1f} hours {at_once} at a time, measured from a few steps",
        flush=True,
    )


def _rehearsed(run: Run, inputs: Path, steps: int = 6) -> float:
    """Seconds of a whole run, from a few steps and one scoring on one thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder, "run")
        config = config_of(run, inputs, where, steps=steps, warmup=0)
        config = config.model_copy(update={"log_every": steps // 2})
        began = time.perf_counter()
        train(prepare(config))
        trained = time.perf_counter()
        rate = json.loads((where / "metrics.jsonl").read_text().splitlines()[-1])["images_per_s"]
        step = config.batch_size / rate
        quizzes = {split: Quiz.read(inputs / run.data, split, config.image_size) for split in SPLITS}
        scoring = time.perf_counter()
        answered(opened(where, steps), quizzes)
        scored = time.perf_counter() - scoring
    full: int = run.settings["training"]["steps"]
    once = trained - began - steps * step + scoring - trained
    return once + full * step + (full // run.settings["score_every"] + 3) * scored


if __name__ == "__main__":
    try:
        app()
    except LiftError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
