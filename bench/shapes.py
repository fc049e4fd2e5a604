"""Which text transform teaches a small image tower word order, and what does it cost elsewhere?

    lift-data shapes data/shapes
    lift-data shapes data/shapes-validation --seed 2
    lift-embed fill data/shapes/*.tar data/shapes-validation/*.tar --cache cache/smollm2 --model smollm2 --snapshot
    python bench/shapes.py --data data/shapes --validation data/shapes-validation --cache smollm2=cache/smollm2

Every transform at equal steps and five seeds on generated scenes; the score is the two-way accuracy between an
image's caption and the same caption with one thing changed (chance 50 %), on scenes held out with all their
twins (`test`) and on scenes with a colour–shape pair never seen (`unseen`), apart. 28 directions are the most that
288 training captions allow. The control, hashed n-grams without any encoder, is bench/posembed.py's `learned:0.5`:
the same tower, data, steps and seeds.

The choices are made on a validation set, where other scenes and other pairs are held out, by rules settled
beforehand. Of several strengths of shrinking, only the one with the highest mean over all cells (task and split) is
run further. Recommended is, of the transforms that beat `none` on swap-object in both splits and lose at most 5
points to the best of `none` and `center` in every cell, the one with the highest mean over all cells; where no
transform does both, the highest mean of all. Accuracies are means over the validation seeds; `none` is not a
candidate.

Gates, on the reported scores of the chosen transform: by paired differences of equal seeds it beats `none` on
swap-object in both splits, 95 % t-interval above 0; and in no cell does it lose more than 5 points, on average, to
the best of `none` and `center`.

A run that is done is not run again. Two side by side, each a process of its own; twice, because the first pass
makes the choice of what the second runs:

    python bench/shapes.py … --list | xargs -P 2 -I{} python bench/shapes.py … --only {}

Takes about 95 CPU seconds a run: 40 minutes with one encoder.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from arms import Interval, run_arm, shapes_accuracy
from cyclopts import App, Parameter

from lift_cache.errors import BadConfig, LiftError
from lift_cache.files import write_atomic
from lift_trainer.config import TransformSpec
from lift_trainer.evaluators.shapes import TASKS
from lift_trainer.evaluators.trained import TrainedRun

# Half and nine tenths of the way from whitening to centring: the leading direction of SmolLM2's captions then
# has 2 and 10 times the variance of the 28th, between 1 (whitened) and 165 (centred).
TRANSFORMS = ("none", "center", "whiten:28", "whiten:28,shrink=0.5", "whiten:28,shrink=0.9")
SPLITS = ("test", "unseen")
CELLS = tuple((split, task) for split in SPLITS for task in TASKS)
GATED = "swap_obj"
MOST_LOST = 0.05

Scores = dict[str, dict[str, float]]
"""Split → task → accuracy of one run."""

app = App(help=__doc__, help_format="plaintext")


@dataclass(frozen=True)
class Run:
    """One training run of the benchmark."""

    name: str
    arm: str
    seed: int
    data: Path
    text: dict[str, str]


@app.default
def main(
    *,
    data: Path,
    validation: Path,
    cache: Annotated[tuple[str, ...], Parameter(negative=())],
    out: Path = Path("runs/bench-shapes"),
    transforms: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = TRANSFORMS,
    seeds: int = 5,
    validation_seeds: int = 1,
    steps: int = 250,
    only: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    list_runs: Annotated[bool, Parameter(name="--list", negative=())] = False,
) -> None:
    """Compare text transforms on shapes; see the head of the file.

    Parameters
    ----------
    data
        What `lift-data shapes` wrote; its held-out scenes are reported.
    validation
        The same with another `--seed`; its held-out scenes choose the transform.
    cache
        NAME=PATH of a cache with the captions of all splits of both; may be given several times.
    out
        Runs, results and shapes.json.
    transforms
        Text transforms, as for lift-train; `none` and `center` must be among them.
    seeds
        Runs of each arm, with seeds 0, 1, ….
    validation_seeds
        Runs of each on the validation set.
    steps
        Steps of 256 images.
    only
        Only this run, without the tables; may be given several times.
    list_runs
        Name the runs that are left, and stop: those on the validation set, and when these are done, the rest.
    """
    if not {"none", "center"} < set(transforms):
        raise BadConfig("--transforms: give none, center and at least one more, which is compared with them")
    encoders = dict(_encoder(given) for given in cache)
    choosing = [
        run
        for encoder, path in encoders.items()
        for run in _runs("validation-", validation, encoder, path, transforms, validation_seeds)
    ]
    if list_runs:
        left = [run for run in choosing if not _result(out, run).exists()]
        if not left:
            finalists = _finalists(encoders, transforms, _results(choosing, out))
            reported = _reported(data, encoders, finalists, seeds)
            left = [run for run in reported if not _result(out, run).exists()]
        print("".join(f"{run.name}\n" for run in left), end="")
        return
    if only:
        every = dict.fromkeys(encoders, transforms)
        known = {run.name: run for run in [*choosing, *_reported(data, encoders, every, seeds)]}
        if unknown := [name for name in only if name not in known]:
            raise BadConfig(f"--only {unknown[0]}: no such run; --list names them")
        for name in only:
            _train(known[name], out, steps)
        return

    validated = _train_all(choosing, out, steps)
    finalists = _finalists(encoders, transforms, validated)
    scores = _train_all(_reported(data, encoders, finalists, seeds), out, steps)
    verdicts: dict[str, Any] = {}
    lines = list(_accuracies(scores))
    for encoder, final in finalists.items():
        chosen = choose({transform: validated[f"{encoder}/{transform}"] for transform in final})
        own = {transform: scores[f"{encoder}/{transform}"] for transform in final}
        gates = Gates.of(chosen, own)
        verdicts[encoder] = {"recommended": chosen} | gates.as_dict()
        lines += [*_differences(encoder, own), *gates.lines(encoder)]
    report = {"steps": steps, "encoders": verdicts, "validation": validated, "arms": scores}
    table = "\n".join(lines) + "\n"
    write_atomic(out / "shapes.json", (json.dumps(report, indent=1) + "\n").encode())
    write_atomic(out / "shapes.txt", table.encode())
    print(f"\n{table}", end="")


# ---------------------------------------------------------------------------------------------- the runs


def _encoder(given: str) -> tuple[str, str]:
    name, equals, path = given.partition("=")
    if not equals:
        raise BadConfig(f"--cache {given}: write NAME=PATH, such as smollm2=cache/smollm2")
    return name, path


def _runs(
    prefix: str, data: Path, encoder: str, cache: str, transforms: Sequence[str], seeds: int
) -> Iterator[Run]:
    for seed in range(seeds):
        for transform in transforms:
            plain = transform.replace(":", "").replace(",", "-").replace("=", "")
            text = {"cache": cache, "text_transform": transform}
            yield Run(f"{prefix}{encoder}-{plain}-seed{seed}", f"{encoder}/{transform}", seed, data, text)


def _reported(
    data: Path, encoders: Mapping[str, str], transforms: Mapping[str, Sequence[str]], seeds: int
) -> list[Run]:
    """`transforms`: those of each encoder."""
    return [
        run
        for encoder, cache in encoders.items()
        for run in _runs("", data, encoder, cache, transforms[encoder], seeds)
    ]


def _result(out: Path, run: Run) -> Path:
    return out / "results" / f"{run.name}.json"


def _train(run: Run, out: Path, steps: int) -> dict[str, Any]:
    """Scores of one run by split and task, beside its name and CPU seconds."""
    config = {
        "data": [str(run.data / "train-*.tar")],
        "tower": "vit:width=128,depth=3,heads=4,patch=8",
        "image_size": 32,
        "batch_size": 256,
        "steps": steps,
        "warmup": "10%",
        "mask": "caption",
        "log_every": 25,
        "seed": run.seed,
        **run.text,
    }

    def evaluate(trained_in: Path) -> dict[str, Any]:
        trained = TrainedRun.open(trained_in)
        return {split: shapes_accuracy(trained, run.data, split) for split in SPLITS}

    return run_arm(out, run.name, config, evaluate)


def _train_all(runs: Sequence[Run], out: Path, steps: int) -> dict[str, list[dict[str, Any]]]:
    """Scores by arm, in the order of seeds."""
    for run in runs:
        _train(run, out, steps)
    return _results(runs, out)


def _results(runs: Sequence[Run], out: Path) -> dict[str, list[dict[str, Any]]]:
    scores: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        scores.setdefault(run.arm, []).append(json.loads(_result(out, run).read_text()))
    return scores


# ---------------------------------------------------------------------------------------------- the verdict


def paired(runs: Sequence[Scores], others: Sequence[Scores], split: str, task: str) -> Interval:
    """Difference of two arms in one cell, by seed."""
    return Interval.of(
        [run[split][task] - other[split][task] for run, other in zip(runs, others, strict=True)]
    )


def best_plain(runs: Mapping[str, Sequence[Scores]], split: str, task: str) -> str:
    """Which of `none` and `center` is better in a cell, by the mean over seeds."""
    return max(("none", "center"), key=lambda name: statistics.fmean(run[split][task] for run in runs[name]))


def overall(runs: Sequence[Scores]) -> float:
    """Mean accuracy over all cells and seeds."""
    return statistics.fmean(run[split][task] for run in runs for split, task in CELLS)


def _finalists(
    encoders: Iterable[str], transforms: Sequence[str], validated: Mapping[str, Sequence[Scores]]
) -> dict[str, list[str]]:
    """What is run further of each encoder: all but the shrunk transforms, and the best of those."""
    shrunk = [transform for transform in transforms if TransformSpec.parse(transform).shrink > 0]

    def dropped(encoder: str) -> set[str]:
        ranked = sorted(shrunk, key=lambda transform: overall(validated[f"{encoder}/{transform}"]))
        return set(ranked[:-1])

    return {
        encoder: [transform for transform in transforms if transform not in dropped(encoder)]
        for encoder in encoders
    }


def choose(runs: Mapping[str, Sequence[Scores]]) -> str:
    """The recommended transform by validation runs of each: the rule at the head of the file."""

    def qualifies(transform: str) -> bool:
        own = runs[transform]
        gains = all(paired(own, runs["none"], split, GATED).mean > 0 for split in SPLITS)
        return gains and all(
            paired(own, runs[best_plain(runs, *cell)], *cell).mean >= -MOST_LOST for cell in CELLS
        )

    candidates = [transform for transform in runs if transform != "none"]
    qualified = [transform for transform in candidates if qualifies(transform)]
    return max(qualified or candidates, key=lambda transform: overall(runs[transform]))


@dataclass(frozen=True)
class Gates:
    """What the recommended transform gains and loses on the reported scores."""

    chosen: str
    gains: dict[str, Interval]
    """Split → swap-object accuracy less that of `none`."""
    losses: dict[tuple[str, str], tuple[str, Interval]]
    """Cell → the better of `none` and `center`, and the accuracy less that one's."""

    @classmethod
    def of(cls, chosen: str, runs: Mapping[str, Sequence[Scores]]) -> Gates:
        """`runs`: transform → reported scores by seed."""
        best = {cell: best_plain(runs, *cell) for cell in CELLS}
        return cls(
            chosen,
            {split: paired(runs[chosen], runs["none"], split, GATED) for split in SPLITS},
            {cell: (plain, paired(runs[chosen], runs[plain], *cell)) for cell, plain in best.items()},
        )

    @property
    def gains_pass(self) -> bool:
        return all(gain.low > 0 for gain in self.gains.values())

    @property
    def lost(self) -> list[tuple[str, str]]:
        """Cells that lose more than they may."""
        return [cell for cell, (_, difference) in self.losses.items() if difference.mean < -MOST_LOST]

    def as_dict(self) -> dict[str, Any]:
        return {
            "gate_swap_object": {
                "passes": self.gains_pass,
                "over_none": {split: asdict(gain) for split, gain in self.gains.items()},
            },
            "gate_losses": {
                "passes": not self.lost,
                "worst_allowed": -MOST_LOST,
                "over_best_of_none_and_center": {
                    split: {
                        task: {"best": self.losses[split, task][0]} | asdict(self.losses[split, task][1])
                        for task in TASKS
                    }
                    for split in SPLITS
                },
            },
        }

    def lines(self, encoder: str) -> Iterator[str]:
        yield f"{encoder}: {self.chosen} is recommended by the validation set"
        for split, gain in self.gains.items():
            verdict = "passes" if gain.low > 0 else "fails"
            yield f"gate {encoder}, swap_obj over none, {split}: {_points(gain)} points: {verdict}"
        worst = min(self.losses, key=lambda cell: self.losses[cell][1].mean)
        for split, task in self.lost or [worst]:
            best, difference = self.losses[split, task]
            verdict = "fails" if self.lost else "passes, and this is the least of all cells"
            yield f"gate {encoder}, {task} against {best}, {split}: {_points(difference)} points: {verdict}"


# ---------------------------------------------------------------------------------------------- tables


def _accuracies(scores: Mapping[str, Sequence[Scores]]) -> Iterator[str]:
    width = max(map(len, scores))
    for split in SPLITS:
        yield split.ljust(width) + "".join(f"{task:>25}" for task in TASKS)
        for arm, runs in scores.items():
            cells = [str(Interval.of([run[split][task] for run in runs])) for task in TASKS]
            yield arm.ljust(width) + "".join(f"{cell:>25}" for cell in cells)
        yield ""


def _differences(encoder: str, runs: Mapping[str, Sequence[Scores]]) -> Iterator[str]:
    width = max(map(len, (encoder, *runs))) + len(" − none, unseen")
    for split in SPLITS:
        head = f"{encoder} − none, {split}"
        yield head.ljust(width) + "".join(f"{task:>25}" for task in TASKS)
        for transform, own in runs.items():
            if transform != "none":
                cells = [_points(paired(own, runs["none"], split, task)) for task in TASKS]
                yield transform.ljust(width) + "".join(f"{cell:>25}" for cell in cells)
        yield ""


def _points(difference: Interval) -> str:
    mean, low, high = (100 * value for value in (difference.mean, difference.low, difference.high))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


if __name__ == "__main__":
    try:
        app()
    except LiftError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
