"""Entry points of all commands: nothing is imported before Ctrl-C is answered."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lift_trainer.loading import loading


def train_main(argv: Sequence[str] | None = None) -> None:
    """`lift-train`; exits 0, 2 on a user's error, 128 + signal when it was stopped."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin take cores from the loader
    with loading("nothing was begun; run the same command again"):
        from lift_trainer.commands import train
    train(argv)


def eval_main(argv: Sequence[str] | None = None) -> None:
    """`lift-eval`."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with loading("nothing was written; run the same command again"):
        from lift_trainer.evaluators.command import main
    main(argv)


def data_main(argv: Sequence[str] | None = None) -> None:
    """`lift-data`."""
    with loading("nothing was begun; run the same command again"):
        from lift_trainer.data.cli import main
    main(argv)


def report_main(argv: Sequence[str] | None = None) -> None:
    """`lift-report`."""
    with loading("no page was written; run the same command again"):
        from lift_trainer.report.cli import main
    main(argv)


def export_main(argv: Sequence[str] | None = None) -> None:
    """`lift-export`."""
    with loading("nothing was written; run the same command again"):
        from lift_trainer.export.command import main
    main(argv)
