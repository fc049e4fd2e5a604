"""Projects that are taken down again, and an engine, or a skip that says so."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.compose.stack import Stack, docker


@pytest.fixture(scope="module")
def stack() -> Iterator[Callable[..., Stack]]:
    """Makes projects, and takes them down at the end with all that they hold."""
    made: list[Stack] = []

    def make(name: str, *overlays: Path, **environment: str) -> Stack:
        made.append(Stack(name, *overlays, **environment))
        return made[-1]

    yield make
    for one in made:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            one.compose("down", "-v", "--timeout", "5", "--remove-orphans")


@pytest.fixture(scope="session")
def engine() -> None:
    """Skips what needs a container engine, where there is none."""
    if shutil.which("docker") is None or docker("info", check=False).returncode:
        pytest.skip("no container engine answers")
