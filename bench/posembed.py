"""Does the position embedding decide whether a small ViT learns relations, and by what: its size or its kind?

    lift-data shapes data/shapes
    python bench/posembed.py --data data/shapes --out runs/posembed

Five position embeddings, five seeds, equal steps, on generated scenes; the score is the two-way accuracy
between an image's caption and the same caption with one thing changed (chance 50 %). Learned ones of three
initial sizes (timm's 0.02, CLIP's width^-0.5, 0.5), fixed sin-cos (root mean square 0.71), and sin-cos
shrunk to 0.02. Size matters if the large ones agree whatever their kind and the small ones too; kind
matters if the sin-cos ones agree whatever their size.

Needs no language model: texts are hashed n-grams, which tell word order apart; `--cache` takes another.
Takes about 45 CPU minutes (30 runs of 90 s) and continues where it was stopped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

from arms import Interval, run_arm, shapes_accuracy
from cyclopts import App, Parameter

from lift_cache.errors import LiftError
from lift_cache.files import write_atomic
from lift_trainer.evaluators.shapes import TASKS
from lift_trainer.evaluators.trained import TrainedRun

CHOICES = ("learned:0.02", "learned:width^-0.5", "learned:0.5", "sincos", "sincos:0.02")
SPLITS = ("test", "unseen")

app = App(help=__doc__, help_format="plaintext")


@app.default
def main(
    *,
    data: Path,
    out: Path = Path("runs/posembed"),
    choices: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = CHOICES,
    seeds: int = 5,
    steps: int = 250,
    cache: str | None = None,
    text_transform: str = "none",
) -> None:
    """Compare position embeddings on shapes; see the head of the file.

    Parameters
    ----------
    data
        What `lift-data shapes` wrote.
    out
        Runs, results and posembed.json.
    choices
        Position embeddings, as for lift-train --pos-embed.
    seeds
        Runs of each, with seeds 0, 1, ….
    steps
        Steps of 256 images.
    cache
        Cache with the captions of all splits, instead of hashed n-grams.
    text_transform
        As for lift-train, with --cache.
    """
    text = {"cache": cache, "text_transform": text_transform} if cache else {"text_control": "ngram-hash"}
    config: dict[str, Any] = {
        "data": [str(data / "train-*.tar")],
        "tower": "vit:width=128,depth=3,heads=4,patch=8",
        "image_size": 32,
        "batch_size": 256,
        "steps": steps,
        "warmup": "10%",
        "mask": "caption",
        "log_every": 25,
        **text,
    }

    def evaluate(run: Path) -> dict[str, Any]:
        trained = TrainedRun.open(run)
        return {split: shapes_accuracy(trained, data, split) for split in SPLITS}

    results: dict[str, list[dict[str, Any]]] = {choice: [] for choice in choices}
    for seed in range(seeds):
        for choice in choices:
            name = f"{choice.replace(':', '-').replace('^', '')}-seed{seed}"
            arm = config | {"pos_embed": choice, "seed": seed}
            results[choice].append(run_arm(out, name, arm, evaluate))
        table = _table(results)
        write_atomic(
            out / "posembed.json", (json.dumps({"steps": steps, "arms": results}, indent=1) + "\n").encode()
        )
        write_atomic(out / "posembed.txt", table.encode())
        print(f"\nafter {seed + 1} of {seeds} seeds\n{table}", flush=True)


def _table(results: dict[str, list[dict[str, Any]]]) -> str:
    width = max(map(len, results))
    lines = []
    for split in SPLITS:
        lines.append(f"{split}".ljust(width) + "".join(f"{task:>27}" for task in TASKS))
        for choice, runs in results.items():
            cells = [str(Interval.of([run[split][task] for run in runs])) for task in TASKS]
            lines.append(choice.ljust(width) + "".join(f"{cell:>27}" for cell in cells))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        app()
    except LiftError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
