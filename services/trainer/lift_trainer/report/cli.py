"""`lift-report`: one page about one or several runs, or a page that answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Group, Parameter
from cyclopts.types import NonNegativeInt
from cyclopts.validators import Number

from lift_cache.errors import BadConfig, BadSource
from lift_cache.files import write_atomic
from lift_cache.terminal import run_command
from lift_trainer.loading import loading

INTERRUPTED = "no page was written, run the same command again"

LIVE = Group("With --serve")
MAX_BAD = 100
"""Samples of --data that may be broken; each one is named and left out."""

HELP = """Put runs, scores, curves and a gallery on one HTML page that needs no network and no other file.

**Two runs beside a control**

`lift-report runs/lift runs/clip --baseline permuted=runs/permuted -o report.html`

**Type a caption, see what each of them finds among these images** (the embedder's key: LIFT_API_KEY)

`lift-report runs/lift runs/clip --serve --data 'held-out/*.tar' --server http://localhost:8080`
"""

app = App(name="lift-report", help=HELP, help_format="markdown")


@app.default
def report(
    *runs: Annotated[
        str,
        Parameter(
            name="RUN", help="Evaluated training runs, or FILE.eval of released files: DIR or NAME=DIR."
        ),
    ],
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
    seed: Annotated[NonNegativeInt, Parameter(help="Which pairs the gallery shows.")] = 0,
    serve: Annotated[
        bool,
        Parameter(negative="", group=LIVE, help="Write no page: serve one, to this machine, until Ctrl-C."),
    ] = False,
    data: Annotated[
        tuple[str, ...],
        Parameter(negative="", consume_multiple=True, group=LIVE, help="Shards or tables with the images."),
    ] = (),
    server: Annotated[
        tuple[str, ...],
        Parameter(
            negative="",
            consume_multiple=True,
            group=LIVE,
            help="Running embedders; each run asks the one of its recipe. None: captions of the runs' caches.",
        ),
    ] = (),
    port: Annotated[
        int, Parameter(group=LIVE, help="0: any free one.", validator=Number(gte=0, lte=65535))
    ] = 8090,
) -> None:
    """Scores beside chance, blind scores and controls; curves, cost, galleries, and how all was made."""
    if not runs:
        raise BadSource("name at least one run: lift-report runs/emoji")
    if serve:
        _serve([*runs, *baseline], data, server, cache, port)
        return
    if data or server:
        raise BadConfig("--data and --server are of the page that answers; add --serve")
    with loading(INTERRUPTED):  # torch takes seconds, which --help should not cost
        from lift_trainer.report.page import Report, render
        from lift_trainer.report.runs import cache_of, open_all, open_cache, open_fill_summary

    opened = open_all([*runs, *baseline])
    page = render(
        Report(
            runs=opened[: len(runs)],
            baselines=opened[len(runs) :],
            cache=open_cache(cache) if cache else cache_of(opened[0]),
            fill=open_fill_summary(fill_summary) if fill_summary else None,
            seed=seed,
        )
    ).encode()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, page)
    except OSError as error:
        raise BadSource(f"{output}: {error.strerror}") from error
    print(f"{output} ({len(page) / 1000:,.0f} kB)")


def _serve(
    runs: Sequence[str], data: Sequence[str], servers: Sequence[str], cache: str | None, port: int
) -> None:
    if not data:
        raise BadConfig("--serve needs images: --data SHARDS")
    with loading("nothing was served"):
        from lift_trainer.evaluators.trained import TrainedRun
        from lift_trainer.rejects import Rejects
        from lift_trainer.report.nearest import open_nearest
        from lift_trainer.report.runs import named
        from lift_trainer.report.serve import Server
        from lift_trainer.samples import build_index

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    index = build_index(data, Rejects(MAX_BAD))
    opened = [(name, TrainedRun.open(path, cache=cache)) for name, path in map(named, runs)]
    nearest = open_nearest(opened, index, servers, say)
    try:
        serving = Server(nearest, port)
    except OSError as error:
        raise BadConfig(f"--port {port}: {error.strerror}; name another, or 0 for any") from None
    say(f"serving {serving.url} to this machine; Ctrl-C ends it")
    with serving:
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            say("ended")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_command(app, argv, interrupted=INTERRUPTED)
