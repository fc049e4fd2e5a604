"""Both engines give the same vectors, whatever shares a batch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module", params=["minilm", "smollm2"])
def found(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    prepared: Callable[[str], Path],
) -> dict[str, np.ndarray]:
    """Vectors of the same token ids in float32, from both engines."""
    prepared(request.param)
    out = tmp_path_factory.mktemp("vectors") / "found.npz"
    program = Path(__file__).with_name("compare_engines.py")
    done = subprocess.run(
        [sys.executable, str(program), request.param, "float32", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(out) as arrays:
        return dict(arrays)


def test_vllm_and_transformers_agree_on_every_caption(found: dict[str, np.ndarray]) -> None:
    cosine = (found["vllm"] * found["transformers"]).sum(1)
    assert np.linalg.norm(found["vllm"], axis=1) == pytest.approx(1, abs=1e-5)
    assert cosine.min() >= 0.9999


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_a_caption_has_the_same_vector_alone_and_in_any_batch(
    engine: str, found: dict[str, np.ndarray]
) -> None:
    whole, alone, odd = (found[f"{engine}{which}"] for which in ("", "-alone", "-odd"))
    assert np.abs(alone - whole[: len(alone)]).max() <= 1e-5
    assert np.abs(odd - whole[1::2]).max() <= 1e-5
