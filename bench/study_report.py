"""What the study's JSONs say: tables, and verdicts by the rules of study.yaml."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arms import Interval
from study_rules import Comparison, Results, Study, composition, last

from lift_trainer.data.paraphrases import VARIANTS
from lift_trainer.evaluators.shapes import SPLITS, TASKS

TERA = 1e12
ASKED = {"seen": "in wordings of training", "new": "in a new wording", "long": "in long captions"}
HELD_OUT = {"test": "held-out scenes", "unseen": "colour–shape pairs never seen"}

Made = Mapping[str, Sequence[Mapping[str, Any]]]
"""Arm → its results, by seed."""


def made_so_far(kept: Results) -> dict[str, list[dict[str, Any]]]:
    """Arms with a reported run. Raises BadConfig, BadSource: a JSON of other settings, or of another recipe."""
    made: dict[str, list[dict[str, Any]]] = {}
    for arm in kept.study.arms:
        if kept.validated(arm) is not None:
            found = [kept.get(run) for run in kept.reported(arm)]
            if results := [one for one in found if one is not None]:
                kept.require_one_recipe(arm, results)
                made[arm] = results
    return made


def tables(study: Study, made: Made) -> Iterator[str]:
    """Markdown, line by line: accuracies by variant, split and task; then what was trained on what."""
    for variant in VARIANTS:
        for split in SPLITS:
            yield f"\nAsked {ASKED[variant]}, {HELD_OUT[split]}: two-way accuracy (blind)\n"
            yield _row("", *(task.replace("_", " ") for task in TASKS), "mean")
            yield _row(*["---"] * (len(TASKS) + 2))
            for arm, results in made.items():
                if variant in last(results[0])[split]:
                    yield _row(arm, *_cells(results, split, variant))
    yield "\nTrained and asked in short and long captions: mean over tasks and splits\n"
    yield _row("", *(f"asked {ASKED[variant]}" for variant in VARIANTS))
    yield _row(*["---"] * (len(VARIANTS) + 1))
    for arm, results in made.items():
        trained = "long" if study.arms[arm].get("caption_field") == "long" else "short"
        cells = [
            _interval([composition(last(one), variant) for one in results])
            if variant in last(results[0])[SPLITS[0]]
            else "cut off"
            for variant in VARIANTS
        ]
        yield _row(f"{arm} (trained {trained})", *cells)
    yield "\nOperations\n"
    yield _row(
        "", "seeds", "learning rate", "parameters", "training, TFLOPs", "embedding its captions, TFLOPs"
    )
    yield _row(*["---"] * 6)
    for arm, results in made.items():
        one = results[0]
        total = one["flops"]["step"] * study.steps / TERA
        rate = one["settings"]["training"]["lr"]
        embedding = one["flops"]["embedding"] / TERA
        yield _row(
            arm, len(results), f"{rate:g}", f"{one['parameters']:,}", f"{total:.2f}", f"{embedding:.2f}"
        )


def _cells(results: Sequence[Mapping[str, Any]], split: str, variant: str) -> Iterator[str]:
    def accuracy(one: Mapping[str, Any], task: str) -> float:
        return float(last(one)[split][variant][task])

    for task in TASKS:
        blind = statistics.fmean(one["blind"][split][variant][task] for one in results)
        yield f"{_interval([accuracy(one, task) for one in results])} ({blind:.0%})"
    yield _interval([statistics.fmean(accuracy(one, task) for task in TASKS) for one in results])


def _interval(values: Sequence[float]) -> str:
    """`66.3%`, of several seeds `68.9% [66.2%, 71.5%]`: without the spaces that line up on a terminal."""
    return re.sub(r"(?<=\[) +|(?<= ) +", "", str(Interval.of(values)).strip())


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


# ------------------------------------------------------------------------------------------- verdicts


@dataclass(frozen=True)
class Verdict:
    """One comparison of study.yaml."""

    comparison: Comparison
    arm: str
    over: str
    difference: Interval
    seeds: int
    wanted: int

    @property
    def word(self) -> str:
        if self.seeds < self.wanted:
            return f"not yet ({self.seeds} of {self.wanted} seeds)"
        if self.difference.low > 0:
            return "supported"
        return "contradicted" if self.difference.high < 0 else "open"

    def __str__(self) -> str:
        points = f"{100 * self.difference.mean:+.1f}"
        if self.seeds > 1:
            points += f" [{100 * self.difference.low:+.1f}, {100 * self.difference.high:+.1f}]"
        return _row(self.comparison.claim, self.arm, self.over, self.comparison.variant, points, self.word)


def best(kept: Results, name: str) -> str | None:
    """An arm, or that of a family with the highest validation score; None while a sweep is not done."""
    arms = kept.study.named(name)
    scores = {arm: kept.validated(arm) for arm in arms}
    if any(score is None for score in scores.values()):
        return None
    return max(arms, key=lambda arm: scores[arm][1])  # type: ignore[index]


def verdicts(kept: Results, made: Made) -> Iterator[Verdict]:
    """Of those comparisons whose arms were both run, with the seeds that both have."""
    for comparison in kept.study.comparisons:
        arm, over = best(kept, comparison.arm), best(kept, comparison.over)
        if arm in made and over in made:
            ours, theirs = (
                {
                    one["settings"]["training"]["seed"]: composition(last(one), comparison.variant)
                    for one in made[name]
                }
                for name in (arm, over)
            )
            both = sorted(ours.keys() & theirs.keys())
            if both:
                difference = Interval.of([ours[seed] - theirs[seed] for seed in both])
                yield Verdict(comparison, arm, over, difference, len(both), len(kept.study.seeds))


def verdict_table(kept: Results, made: Made) -> Iterator[str]:
    yield "\nBy the rules of bench/study.yaml: the mean over tasks and splits, differences in points, paired by seed\n"
    yield _row("claim", "arm", "over", "asked", "difference", "verdict")
    yield _row(*["---"] * 6)
    yield from map(str, verdicts(kept, made))


def equal_compute(kept: Results, made: Made) -> Iterator[str]:
    """The joint arm where it has taken as many operations as the whole run of the fixed one."""
    if not {"fixed", "joint"} <= kept.study.families.keys():
        return
    fixed, joint = best(kept, "fixed"), best(kept, "joint")
    if fixed not in made or joint not in made:
        return
    yield (
        "\nAt equal operations: the joint arm's last score within those of the fixed arm's whole run. Read before its "
        "end, its learning rate has not come down yet, so a run planned to be that short should score better\n"
    )
    yield _row("embedding shared by", "asked", fixed, f"{joint}, after steps", "its score")
    yield _row(*["---"] * 5)
    for runs in kept.study.amortised_over:
        budget = spent(made[fixed][0], kept.study.steps, runs)
        points = [point["step"] for point in made[joint][0]["curve"]]
        within = [step for step in points if spent(made[joint][0], step, runs) <= budget]
        for variant in ("seen", "new"):
            ours = statistics.fmean(composition(last(one), variant) for one in made[fixed])
            theirs = f"{at(made[joint], within[-1], variant):.1%}" if within else "no score that early"
            yield _row(
                f"{runs} run{'s' * (runs > 1)}", variant, f"{ours:.1%}", within[-1] if within else "", theirs
            )


# ---------------------------------------------------------------------------------------------- curves


def spent(result: Mapping[str, Any], step: int, runs: int | None) -> float:
    """Operations up to a step; with a share of the embedding of all captions, unless `runs` is None."""
    embedding = result["flops"]["embedding"] / runs if runs else 0.0
    return float(step * result["flops"]["step"] + embedding)


def at(results: Sequence[Mapping[str, Any]], step: int, variant: str) -> float:
    """Mean over seeds of the composition score after a step."""
    return statistics.fmean(
        composition(point["scores"], variant)
        for one in results
        for point in one["curve"]
        if point["step"] == step
    )
