"""`lift-eval`: one checkpoint or many, one task or a suite of them."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Group, Parameter
from cyclopts.types import PositiveInt

from lift_cache.errors import BadConfig, BadSource
from lift_cache.terminal import run_command
from lift_trainer.config import RUN, TEXT, listed
from lift_trainer.evaluators.tasks import TASKS, Task, open_tasks, read_suite
from lift_trainer.loading import loading

if TYPE_CHECKING:
    from lift_trainer.evaluators.protocol import Encoder
    from lift_trainer.evaluators.result import Result

INTERRUPTED = "what was written stays; the same command starts anew"

HELP = """Evaluate training runs and released checkpoints.

Texts take the same way as in training: the cache by key, or the embedder of the same recipe, then the run's own text
transform. What had to be embedded is kept in RUN/eval, so that the same evaluation again embeds nothing. Every score
has a 95 % interval, from resampling images.

**One task, two runs**

`lift-eval retrieval --run runs/a runs/b --data 'held-out/*.tar'`

**Many tasks, as a file lists them**

`lift-eval suite suite.yaml --run runs/a runs/b`

**The files that LIFT's authors released**

`lift-eval sugarcrepe --checkpoint lift.pt clip.pt --cache caches/nv-embed-v2 --pixel-stats reference
--data sugar-crepe/data --images coco/val2017`

**What the second has more than the first, item by item**

`lift-eval compare runs/a runs/b`
"""

SHOW = Group("Output")


@Parameter(name="*")
@dataclass(frozen=True)
class Subjects:
    """What is evaluated, and how its vectors are made."""

    run: Annotated[
        list[Path],
        listed(RUN, "Directories of training runs; the newest checkpoint of each is used."),
    ] = field(default_factory=list)
    checkpoint: Annotated[
        list[Path],
        listed(RUN, "Files that LIFT's authors released, of LIFT or CLIP; results go to FILE.eval."),
    ] = field(default_factory=list)
    pixel_stats: Annotated[
        Literal["training", "reference"],
        Parameter(
            group=RUN,
            help="Of --checkpoint files: as they were trained (OpenAI's), or as the authors' evaluation has them "
            "(ImageNet's, and the central 224 of 256 pixels).",
        ),
    ] = "training"
    cache: Annotated[
        str | None,
        Parameter(
            group=TEXT,
            help="Cache with the captions, of the same recipe. Default: the run's. A released LIFT needs one, or a "
            "server.",
        ),
    ] = None
    server: Annotated[
        str | None, Parameter(group=TEXT, help="Embedder for captions that the cache lacks.")
    ] = None
    train_data: Annotated[
        list[str],
        listed(
            TEXT,
            "Of --checkpoint files: shards of what they were trained on, or of a part of it, for blind scores and "
            "distances. A run knows its own.",
        ),
    ] = field(default_factory=list)
    device: Annotated[str, Parameter(group=RUN, help="cpu, cuda, …; auto: cuda where there is one.")] = "auto"
    batch_size: Annotated[PositiveInt, Parameter(group=RUN, help="Images at a time; changes no score.")] = 256

    def openers(self) -> list[tuple[Callable[[], Encoder], Path]]:
        """What opens each encoder, and the folder of its results.

        One is in memory at a time, but that each is there is known before anything is computed.

        Raises:
            BadConfig: nothing is given.
            BadSource: no such file.
            CacheNotFound, CacheDamaged: no whole checkpoint.
        """
        with loading(INTERRUPTED):
            from lift_trainer.checkpoint import require_checkpoint
            from lift_trainer.evaluators.released import ReleasedModel, results_folder
            from lift_trainer.evaluators.trained import TrainedRun

        if not self.run and not self.checkpoint:
            raise BadConfig(
                "nothing to evaluate; name a training run by --run, or a released file by --checkpoint"
            )
        if self.pixel_stats != "training" and not self.checkpoint:
            raise BadConfig(
                f"--pixel-stats {self.pixel_stats} is for files given by --checkpoint; a run has its own"
            )

        if self.train_data and not self.checkpoint:
            raise BadConfig("--train-data is for files given by --checkpoint; a run knows its own")

        def opener(run: Path) -> Callable[[], Encoder]:
            checkpoint = require_checkpoint(run)
            return lambda: TrainedRun.open(
                run,
                self.device,
                cache=self.cache,
                server=self.server,
                batch_size=self.batch_size,
                checkpoint=checkpoint,
            )

        def released(path: Path) -> Callable[[], Encoder]:
            if not path.is_file():
                raise BadSource(f"--checkpoint {path}: no such file; a training run is given by --run")
            return lambda: ReleasedModel.open(
                path,
                self.device,
                pixel_stats=self.pixel_stats,
                cache=self.cache,
                server=self.server,
                train_data=self.train_data,
                batch_size=self.batch_size,
            )

        return [(opener(run), run / "eval") for run in self.run] + [
            (released(path), results_folder(path, self.pixel_stats)) for path in self.checkpoint
        ]


AsJson = Annotated[
    bool,
    Parameter(
        name="--json", negative="", group=SHOW, help="Print one JSON list of results instead of tables."
    ),
]


def main(argv: Sequence[str] | None = None) -> None:
    """Exits 0, 2 on a user's error, 130 when interrupted."""
    run_command(_app(), argv, interrupted=INTERRUPTED)


def _app() -> App:
    app = App(name="lift-eval", version=version("lift-trainer"), help=HELP, help_format="markdown")
    for name, kind in TASKS.items():
        app.command(_command(kind), name=name, help=kind.__doc__)

    @app.command
    def suite(
        file: Annotated[Path, Parameter(help="YAML: a list of tasks, `task: NAME` and its settings.")],
        /,
        *,
        subjects: Subjects = Subjects(),
        as_json: AsJson = False,
    ) -> int:
        """Every task of a file, for every run.

        `lift-eval suite suite.yaml --run runs/a runs/b`
        """
        return _evaluate(read_suite(file), subjects, as_json)

    @app.command
    def compare(
        *places: Annotated[
            Path,
            Parameter(
                help="Runs, folders of results or result files; the first is compared with each other."
            ),
        ],
        as_json: AsJson = False,
    ) -> int:
        """What each further run has more than the first, on equal items; marked where the interval excludes 0.

        `lift-eval compare runs/clip runs/lift`
        """
        return _compare(places, as_json)

    return app


def _command(kind: type[Task]) -> Callable[..., int]:
    def command(*, task: Task, subjects: Subjects = Subjects(), as_json: AsJson = False) -> int:
        return _evaluate([task], subjects, as_json)

    command.__annotations__["task"] = Annotated[kind, Parameter(name="*")]
    return command


def _evaluate(tasks: Sequence[Task], subjects: Subjects, as_json: bool) -> int:
    with loading(INTERRUPTED):
        from lift_trainer.evaluators.table import distinct_names, table

    openers = subjects.openers()
    evaluators = open_tasks(tasks)
    for _, folder in openers:
        _require_folder(folder)
    results: list[Result] = []
    for open_encoder, folder in openers:
        encoder = open_encoder()
        for evaluator in evaluators:
            result = evaluator.evaluate(encoder)
            print(f"written to {result.write(folder)}", file=sys.stderr)
            results.append(result)
    names = distinct_names(
        [result.subject.name for result in results[:: len(evaluators)]],
        [str(place) for place in [*subjects.run, *subjects.checkpoint]],
    )
    if as_json:
        print(json.dumps([result.model_dump(mode="json") for result in results]))
    else:
        shown = [
            result.model_copy(update={"subject": result.subject.model_copy(update={"name": name})})
            for number, name in enumerate(names)
            for result in results[number * len(evaluators) : (number + 1) * len(evaluators)]
        ]
        print(table(shown))
    if subjects.run:
        print(f"next: lift-report {' '.join(map(str, subjects.run))}", file=sys.stderr)
    return 0


def _require_folder(folder: Path) -> None:
    """Raises BadConfig: no result could be written there, which is known before hours of scoring."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadConfig(
            f"{folder}: results cannot be written there ({error.strerror or error}); give a folder that you may "
            "write to"
        ) from None


def _compare(places: Sequence[Path], as_json: bool) -> int:
    with loading(INTERRUPTED):
        from lift_trainer.evaluators.compare import differences, paired, results_of
        from lift_trainer.evaluators.table import difference_table, distinct_names

    if len(places) < 2:
        raise BadConfig("compare takes at least two runs: lift-eval compare runs/a runs/b")
    found = [results_of(place) for place in places]
    names = distinct_names([results[0].subject.name for results in found], [str(place) for place in places])
    found = [
        [r.model_copy(update={"subject": r.subject.model_copy(update={"name": name})}) for r in results]
        for name, results in zip(names, found, strict=True)
    ]
    said, tables = [], []
    for other in found[1:]:
        for first, second in paired(found[0], other):
            between = differences(first, second)
            tables.append(difference_table(first, second, between))
            said.append(
                {
                    "task": first.task,
                    "data": first.name,
                    "protocol": first.protocol,
                    "first": first.subject.name,
                    "second": second.subject.name,
                    "scores": [asdict(one) | {"marked": one.marked} for one in between],
                }
            )
    print(json.dumps(said) if as_json else "\n\n".join(tables))
    return 0
