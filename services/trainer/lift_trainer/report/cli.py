"""`lift-report`: one page about one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from lift_cache.errors import BadSource
from lift_cache.files import write_atomic
from lift_cache.terminal import run_command
from lift_trainer.report.page import Report, render
from lift_trainer.report.runs import cache_of, open_cache, open_fill_summary, open_runs

app = App(
    name="lift-report",
    help="Put runs, scores, loss and a gallery on one HTML page that needs no network and no other file.",
    help_epilogue=(
        "Example: `lift-report runs/emoji --baseline permuted=runs/emoji-permuted -o report.html`. "
        "A run can be given a name: `smollm2=runs/a`."
    ),
)


@app.default
def report(
    *runs: Annotated[str, Parameter(name="RUN", help="Folders of evaluated training runs, DIR or NAME=DIR.")],
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="The page.")] = Path("report.html"),
    baseline: Annotated[
        tuple[str, ...],
        Parameter(
            negative="", consume_multiple=True, help="A control to show beside the runs, DIR or NAME=DIR."
        ),
    ] = (),
    cache: Annotated[
        str | None, Parameter(help="Cache, PATH or PATH@ID, when it is not where the run found it.")
    ] = None,
    fill_summary: Annotated[
        Path | None, Parameter(help="JSON that `lift-embed fill --summary` wrote: captions read and unique.")
    ] = None,
) -> None:
    """Scores beside chance and beside controls, loss curves, a gallery of held-out captions, and how all was made."""
    if not runs:
        raise BadSource("name at least one run: lift-report runs/emoji")
    opened = open_runs([*runs, *baseline])
    page = render(
        Report(
            runs=opened[: len(runs)],
            baselines=opened[len(runs) :],
            cache=open_cache(cache) if cache else cache_of(opened[0]),
            fill=open_fill_summary(fill_summary) if fill_summary else None,
        )
    ).encode()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, page)
    except OSError as error:
        raise BadSource(f"{output}: {error.strerror}") from error
    print(f"{output} ({len(page) / 1000:,.0f} kB)")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_command(app, argv, interrupted="no page was written, run the same command again")
