"""Held-out emoji: does a real text encoder teach an image tower more than its controls?

    lift-data emoji data/emoji
    python bench/emoji.py --data data/emoji --cache smollm2=cache/smollm2 --cache minilm=cache/minilm

Every arm trains the small ViT of scripts/demo.yaml from scratch and is scored on 191 held-out emoji with 191 distinct
captions: R@10, the mean of image to text and text to image, over three seeds with a 95 % t-interval. Arms
are ENCODER/TRANSFORM, the same with the captions permuted (which must be at chance, 5.2 %), and hashed
n-grams without any encoder. The gate: the lower bound of a real arm is at least three times the upper bound
of its permuted twin.

An arm that is done is not run again; `--arms` selects some, `--list` names them all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import yaml
from arms import Interval, run_arm
from cyclopts import App, Parameter

from lift_cache.errors import BadConfig, LiftError
from lift_cache.files import write_atomic
from lift_trainer.evaluators.captioned import open_captioned
from lift_trainer.evaluators.retrieval import CUTOFFS, DIRECTIONS, Retrieval
from lift_trainer.evaluators.trained import TrainedRun
from lift_trainer.rejects import Rejects

TRANSFORMS = ("none", "center", "whiten:128", "whiten:128,shrink=0.5")
GATE = 3.0
SETTINGS = Path(__file__).parent.parent / "scripts" / "demo.yaml"
PERMUTED = "/permuted"

app = App(help=__doc__, help_format="plaintext")


@app.default
def main(
    *,
    data: Path,
    out: Path = Path("runs/bench-emoji"),
    cache: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    transforms: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = TRANSFORMS,
    arms: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = (),
    seeds: int = 3,
    epochs: int | None = None,
    list_arms: Annotated[bool, Parameter(name="--list", negative=())] = False,
) -> None:
    """Compare encoders, transforms and controls on held-out emoji; see the head of the file.

    Parameters
    ----------
    data
        What `lift-data emoji` wrote.
    out
        Runs, results and emoji.json.
    cache
        NAME=PATH of a cache with the captions of both splits; may be given several times.
    transforms
        Text transforms, as for lift-train.
    arms
        Only these. Default: all.
    seeds
        Runs of each arm, with seeds 0, 1, ….
    epochs
        Passes over the training emoji. Default: the demo's.
    list_arms
        Name the arms and stop.
    """
    config: dict[str, Any] = {
        **yaml.safe_load(SETTINGS.read_text()),
        "data": [str(data / "train-*.tar")],
        "log_every": 26,
    }
    if epochs is not None:
        config["epochs"] = epochs
    known = dict(_arms(cache, transforms))
    if list_arms:
        print("\n".join(known))
        return
    unknown = [arm for arm in arms if arm not in known]
    if unknown:
        raise BadConfig(f"--arms {unknown[0]}: no such arm; there are {', '.join(known)}")

    rejects = Rejects(0)
    test = Retrieval("test", open_captioned([str(data / "test-*.tar")], rejects), "any-caption", max_bad=0)

    def evaluate(run: Path) -> dict[str, Any]:
        scores = test.evaluate(TrainedRun.open(run)).scores
        return {
            "mean_r10": scores["r@10_mean"].value,
            **{name: {f"r@{k}": scores[f"r@{k}_{name}"].value for k in CUTOFFS} for name in DIRECTIONS},
            "chance": {f"r@{k}": scores[f"r@{k}_mean"].chance for k in CUTOFFS},
        }

    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms or known}
    for seed in range(seeds):
        for arm, runs in results.items():
            name = f"{arm.replace('/', '-').replace(':', '').replace(',', '-')}-seed{seed}"
            runs.append(run_arm(out, name, config | known[arm] | {"seed": seed}, evaluate))
            print(f"{arm}, seed {seed}: mean R@10 {runs[-1]['mean_r10']:.1%}", flush=True)
    intervals = {arm: Interval.of([run["mean_r10"] for run in runs]) for arm, runs in results.items()}
    summary = {arm: asdict(interval) for arm, interval in intervals.items()}
    report = {"epochs": config["epochs"], "mean_r10": summary, "arms": results}
    write_atomic(out / "emoji.json", (json.dumps(report, indent=1) + "\n").encode())
    table = _table(results, intervals)
    write_atomic(out / "emoji.txt", table.encode())
    print(f"\n{table}", end="")


def _arms(caches: tuple[str, ...], transforms: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    for cache in caches:
        encoder, equals, path = cache.partition("=")
        if not equals:
            raise BadConfig(f"--cache {cache}: write NAME=PATH, such as smollm2=cache/smollm2")
        for transform in transforms:
            settings = {"cache": path, "text_transform": transform}
            yield f"{encoder}/{transform}", settings
            yield f"{encoder}/{transform}{PERMUTED}", settings | {"text_control": "permuted"}
    yield "ngram-hash", {"text_control": "ngram-hash"}


def _table(results: dict[str, list[dict[str, Any]]], intervals: dict[str, Interval]) -> str:
    width = max(map(len, results))
    lines = [f"{'':{width}}  {'mean R@10, 95 %':24}  image→text  text→image"]
    for arm, runs in sorted(results.items(), key=lambda item: -intervals[item[0]].mean):
        way = [
            sum(run[side]["r@10"] for run in runs) / len(runs) for side in ("image_to_text", "text_to_image")
        ]
        lines.append(f"{arm:{width}}  {intervals[arm]!s:24}  {way[0]:10.1%}  {way[1]:10.1%}")
    chance = next(iter(results.values()))[0]["chance"]["r@10"]
    lines.append(f"{'chance':{width}}  {chance:6.1%}")
    for arm, real in intervals.items():
        control = intervals.get(arm + PERMUTED)
        if control is not None:
            ratio = real.low / control.high
            verdict = "passes" if ratio >= GATE else "fails"
            at_chance = "holds" if control.low <= chance <= control.high else "misses"
            lines.append(
                f"gate {arm}: lower bound {real.low:.1%} is {ratio:.1f} × the permuted upper bound "
                f"{control.high:.1%}: {verdict} (at least {GATE:g}); the permuted interval {at_chance} chance"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        app()
    except LiftError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
