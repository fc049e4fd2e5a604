"""Embed some captions with both engines; run as a program, since vLLM's child re-imports its main module.

compare_engines.py MODEL DTYPE OUT.npz
"""

from __future__ import annotations

import asyncio
import sys

import numpy as np

from lift_embedder import models
from lift_embedder.engines import create_engine
from lift_embedder.recipes import RecipeOptions, build_recipe
from lift_embedder.tokens import CaptionTokenizer

CAPTIONS = [
    "a red circle above a blue square",
    "a blue circle above a red square",
    "dog",
    "🍎 émoji and ünïcode, 猫",
    "two small boats left of a large ship under a cloudy sky " * 4,
    "word " * 100,
    *(f"photo number {i} of a {'very ' * (i % 7)}old house by the sea" for i in range(40)),
]


async def main(name: str, dtype: str, out: str) -> None:
    model = models.resolve(name)
    recipe = build_recipe(
        model.named, model.name, model.facts, RecipeOptions.model_validate({"dtype": dtype})
    )
    inputs = [tokens.ids for tokens in CaptionTokenizer(recipe, models.load_tokenizer(model))(CAPTIONS)]
    found: dict[str, np.ndarray] = {}
    for kind in ("vllm", "transformers"):
        engine = create_engine(kind, model.folder, recipe, batch_tokens=8192)  # type: ignore[arg-type]
        await engine.start()
        found[kind] = await engine.embed(inputs)
        alone = [await engine.embed([ids]) for ids in inputs[:6]]
        odd = await engine.embed(inputs[1::2])
        found[f"{kind}-alone"], found[f"{kind}-odd"] = np.concatenate(alone), odd
        await engine.aclose()
    np.savez(out, **found)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
