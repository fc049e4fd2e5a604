"""`lift-export`: a trained run as a folder that another library loads."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from lift_cache.terminal import run_command
from lift_trainer.evaluators.trained import TrainedRun
from lift_trainer.export.exporting import LayoutName, export
from lift_trainer.export.source import source_of

INTERRUPTED = "nothing was written, run the same command again"

app = App(
    name="lift-export",
    version=version("lift-trainer"),
    help="Write a run's image encoder for another library, load it back with that library, and compare.",
    help_epilogue="Example: `lift-export runs/emoji --to huggingface --out emoji-encoder`",
)


@app.default
def to_folder(
    run: Annotated[
        Path, Parameter(name="RUN", help="Folder of a training run; its newest checkpoint is used.")
    ],
    *,
    to: Annotated[LayoutName, Parameter(help="Library that is to load it.")],
    out: Annotated[
        Path, Parameter(help="Folder to make, with weights, text transform, lift.json and a model card.")
    ],
    name: Annotated[str | None, Parameter(help="Title of the model card. Default: the run's name.")] = None,
) -> None:
    """Needs no network; float32, on the CPU."""
    source = source_of(TrainedRun.open(run, device="cpu"), name or run.resolve().name)
    check = export(source, to, out)
    print(
        f"{out}: loaded back by {check.library}, largest difference {check.largest_difference:.1e} "
        f"on {check.images} images; next: {out / 'README.md'} says how to use it"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_command(app, argv, interrupted=INTERRUPTED)
