"""What becomes of batches when the engine is closed under them."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lift_cache.errors import EngineUnavailable
from lift_cache.recipe import Recipe
from lift_embedder.engines.transformers_engine import TransformersEngine


@pytest.mark.parametrize("fails", [True, False])
def test_batches_of_an_engine_that_is_closed_get_engine_unavailable_or_their_vectors(
    fails: bool, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, going = threading.Event(), threading.Event()

    def forward(self: Any, model: Any, batch: list[list[int]]) -> np.ndarray:
        running.set()
        going.wait(10)
        assert model is not None
        if fails:
            raise TypeError("freed under it")
        return np.ones((len(batch), recipe.dimensions), np.float32)

    monkeypatch.setattr(TransformersEngine, "_forward", forward)

    async def main() -> None:
        engine = TransformersEngine(Path("nowhere"), recipe, batch_tokens=100)
        engine._model = object()
        under_way = asyncio.create_task(engine.embed([[1, 2]]))
        queued = asyncio.create_task(engine.embed([[3]]))
        assert await asyncio.to_thread(running.wait, 10)
        await engine.aclose()
        with pytest.raises(EngineUnavailable):
            await queued
        going.set()
        if fails:
            with pytest.raises(EngineUnavailable):
                await under_way
        else:
            assert (await under_way).shape == (1, recipe.dimensions)

    asyncio.run(main())
