"""`make compose-check` where no container engine can run: it says what it did not check, and is no failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def check(lab: Path) -> list[str]:
    """What the check says at its end, with no engine to be reached."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "compose_check.py", "--lab", lab],
        env={**os.environ, "DOCKER_HOST": "unix:///nowhere"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("compose-check: ")]


@pytest.mark.slow
def test_without_an_engine_one_line_names_what_was_not_checked(tmp_path: Path) -> None:
    first, last = check(tmp_path / "none")
    assert first.startswith("compose-check: NOT CHECKED: build, up, kill, up again, down -v, backup")
    assert "no container engine answers" in first
    assert last == "compose-check: what was checked holds"


@pytest.mark.slow
def test_a_lab_that_does_not_start_is_named_with_its_last_words(tmp_path: Path) -> None:
    for name, script in (
        ("lib.sh", ""),
        ("start.sh", ""),
        ("fetch.sh", "echo no network >&2; exit 1"),
        ("stop.sh", ""),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    first, _ = check(tmp_path)
    assert "NOT CHECKED" in first and "fetch.sh failed: no network" in first
