"""`lift-cache`: what can be done with a cache, without a server."""

from __future__ import annotations

from cyclopts import App

from lift_cache import __version__
from lift_cache.terminal import run_command
from lift_cache.tools.card import info
from lift_cache.tools.check import verify
from lift_cache.tools.convert import convert
from lift_cache.tools.export import app as export_app
from lift_cache.tools.importing import import_command
from lift_cache.tools.lookup import lookup
from lift_cache.tools.maintain import adopt, compact, gc, merge, seal, snapshot_app
from lift_cache.tools.plan import plan
from lift_cache.tools.remote import pull, push
from lift_cache.tools.repair import repair

app = App(
    name="lift-cache",
    version=__version__,
    help="Look after a cache of caption embeddings: plan it, describe it, check it, move it, mend it.",
    help_epilogue="Example: `lift-cache info runs/demo/cache`, `lift-cache snapshot CACHE`, `lift-cache verify CACHE`",
)
for command in (plan, info, lookup, verify, repair, seal, compact, gc, merge, adopt, convert, push, pull):
    app.command(command)
app.command(snapshot_app)
app.command(export_app)
app.command(import_command, name="import")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    run_command(app, argv, interrupted="nothing that was acknowledged is lost; run the same command again")


if __name__ == "__main__":
    main()
