"""Losses of every preset: as they are stored, and as the commit before had them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_losses_are_those_that_are_stored_and_those_of_the_commit_before() -> None:
    """Prints what they were compared with: without a commit before there is nothing to compare with."""
    command = [sys.executable, str(ROOT / "scripts/losses.py"), "--parent"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    print(ended.stdout)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr[-2000:]}"
    for preset in ("clip", "lift", "lift-cosine", "lit", "recommended", "sail", "sharelock"):
        assert preset in ended.stdout.splitlines()[0]
