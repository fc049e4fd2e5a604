"""A little of each part of the torture suite; `make torture` runs all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("part", ["powerloss", "kill", "damage", "disks", "machine"])
def test_a_cache_keeps_its_promise_through(part: str) -> None:
    suite = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, suite, "--only", part, "--budget", "10"], check=False, capture_output=True, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 violations" in done.stdout
