"""`lift-cache`: look at a cache, seal it, make snapshots of it, check it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from lift_cache import __version__
from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig, CacheNotFound
from lift_cache.recipe import Recipe
from lift_cache.segment import Segment, segment_ids
from lift_cache.snapshot import load_manifest, snapshots_of
from lift_cache.terminal import run_command
from lift_cache.verify import verify as verify_cache

app = App(
    name="lift-cache",
    version=__version__,
    help="Look at a cache of caption embeddings, seal it, make snapshots of it, check every byte.",
    help_epilogue="Example: `lift-cache info runs/demo/cache`, `lift-cache snapshot CACHE`, `lift-cache verify CACHE`",
)

CachePath = Annotated[Path, Parameter(help="The cache directory.")]
AsJson = Annotated[
    bool, Parameter(name="--json", negative="", help="Print one JSON object instead of a table.")
]


@app.command
def info(cache: CachePath, *, as_json: AsJson = False) -> None:
    """Say what made a cache, how it is stored and what is in it (sealed rows and snapshots)."""
    card = _card(cache)
    if as_json:
        print(json.dumps(card, indent=2))
        return
    console = Console()
    table = Table(title=str(cache), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in (*card["recipe"].items(), ("fingerprint", card["fingerprint"])):
        table.add_row("recipe" if name == "model" else "", name, str(value))
    for name, value in card["encoding"].items():
        table.add_row("encoding" if name == "version" else "", name, str(value))
    for name in ("segments", "sealed_rows", "sealed_bytes"):
        table.add_row("content" if name == "segments" else "", name.replace("_", " "), f"{card[name]:,}")
    for snapshot in card["snapshots"]:
        said = f"{snapshot['rows']:,} captions, {snapshot['tokens']:,} tokens, {snapshot['truncated']:,} truncated"
        table.add_row("snapshot", snapshot["id"], said)
    console.print(table)
    if not card["snapshots"]:
        console.print(f"no snapshot yet: `lift-cache snapshot {cache}` makes one that trainers can read")


def _card(cache: Path) -> dict[str, Any]:
    if not (cache / "recipe.json").is_file():
        raise CacheNotFound(f"{cache} is not a cache (no recipe.json); check the path")
    recipe, encoding = Recipe.load(cache / "recipe.json"), Encoding.load(cache / "encoding.json")
    segments = [Segment(cache / "segments", name) for name in segment_ids(cache / "segments")]
    manifests = [(name, load_manifest(cache, name)) for name in snapshots_of(cache)]
    return {
        "recipe": recipe.model_dump(mode="json"),
        "fingerprint": recipe.fingerprint,
        "encoding": encoding.model_dump(mode="json"),
        "segments": len(segments),
        "sealed_rows": sum(segment.rows for segment in segments),
        "sealed_bytes": sum(path.stat().st_size for path in (cache / "segments").glob("*.arrow")),
        "snapshots": [
            {
                "id": name,
                "rows": m.rows,
                "tokens": m.tokens,
                "truncated": m.truncated,
                "provenance": m.provenance,
            }
            for name, m in manifests
        ],
    }


@app.command
def seal(cache: CachePath, *, as_json: AsJson = False) -> None:
    """Move every fresh row into sealed Arrow segments, so that `live/` holds nothing that is not elsewhere.

    Do this before an upgrade or a backup. A running server seals by itself; stop it first.
    """
    with _writer()(cache) as writer:
        rows = writer.seal()
        segments = writer.stats().segments
    _say(as_json, {"sealed": rows, "segments": segments}, f"sealed {rows:,} rows; {segments:,} segments")


@app.command
def snapshot(cache: CachePath, *, as_json: AsJson = False) -> None:
    """Seal, then make an immutable view that trainers read. Nothing new to see gives the newest one again."""
    with _writer()(cache) as writer:
        made = writer.snapshot()
    _say(
        as_json,
        {"id": made.id, "path": str(made.path), "rows": made.rows},
        f"snapshot {made.id}: {made.rows:,} captions; train with `lift-train --cache {cache}`",
    )


@app.command
def verify(cache: CachePath, *, as_json: AsJson = False) -> int:
    """Read every byte: checksums, order, captions against keys, snapshots. Exit status 1 when anything is wrong."""
    console = Console(stderr=True)
    with console.status("reading") as status:
        report = verify_cache(cache, lambda what: status.update(f"reading {what}"))
    if as_json:
        print(report.to_json())
    else:
        for problem in report.problems:
            print(f"damaged: {problem}")
        verdict = f"{len(report.problems)} problems" if report.problems else "all good"
        print(
            f"{report.segments:,} segments, {report.rows:,} rows, {report.snapshots:,} snapshots; "
            f"live: {report.live}; {verdict}"
        )
    return 1 if report.problems else 0


def _writer() -> Callable[[Path], Any]:
    try:
        from lift_cache.writer import CacheWriter  # readers have no LMDB
    except ImportError:
        raise BadConfig(
            "lmdb is not installed here; run this where the embedder is, or install lift-cache[writer]"
        ) from None
    return CacheWriter.open


def _say(as_json: bool, values: dict[str, Any], text: str) -> None:
    print(json.dumps(values) if as_json else text)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    run_command(app, argv, interrupted="nothing that was acknowledged is lost; run the same command again")


if __name__ == "__main__":
    main()
