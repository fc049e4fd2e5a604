"""What the tools share at the edge: parameters and ways to speak."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

CachePath = Annotated[Path, Parameter(help="The cache directory.")]
Location = Annotated[str, Parameter(help="The cache directory, or DIRECTORY@SNAPSHOT for an older snapshot.")]
AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON object instead of text.")]


def say(as_json: bool, values: Mapping[str, Any], text: str) -> None:
    """Print a result: `values` as one JSON object, or `text`."""
    print(json.dumps(values) if as_json else text)


@contextlib.contextmanager
def progress(total: int | None, what: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; call what it yields with the number of units just done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=total)
        yield lambda done: bars.advance(task, done)
