"""What every suite may use: a small recipe and vectors for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import numpy as np
import pytest

from lift_cache.recipe import Recipe

DIMENSIONS = 24

# A shell that runs the suite in its background has it ignore Ctrl-C, and so would every program tested here.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(
        model="tests/tiny",
        revision="0" * 40,
        dtype="float32",
        tokenizer_revision="0" * 40,
        end_token=True,
        pooling="last",
        max_tokens=77,
        normalize=True,
        dimensions=DIMENSIONS,
    )


@pytest.fixture
def vectors() -> Callable[..., np.ndarray]:
    """Random unit vectors: float32 [n, d]."""

    def make(n: int, seed: int = 0, dimensions: int = DIMENSIONS) -> np.ndarray:
        drawn = np.random.default_rng(seed).normal(size=(n, dimensions)).astype(np.float32)
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    return make


@pytest.fixture(scope="session", autouse=True)
def _state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What `lift-embed fill` remembers between runs stays out of the user's directories."""
    os.environ.setdefault("LIFT_STATE", str(tmp_path_factory.mktemp("state")))
