"""Small tokenizers with the special tokens of the real ones, and an engine that fails on command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from lift_cache.errors import EngineUnavailable
from lift_cache.recipe import Recipe
from lift_embedder.recipes import ModelFacts
from lift_embedder.runtime import shield_imports

WORDS = "a red blue circle square above below the dog cat chases instruct query : passage".split()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[..., Any]:
    """Build a word-level tokenizer: `before` and `after` are special tokens that its own template adds."""
    shield_imports()
    from transformers import PreTrainedTokenizerFast

    def build(*, before: str | None = None, after: str | None = None, eos: str | None = None) -> Any:
        special = [token for token in dict.fromkeys((before, after, eos, "<unk>")) if token]
        vocabulary = {token: i for i, token in enumerate([*special, *WORDS])}
        backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = Whitespace()
        if before or after:
            backend.post_processor = TemplateProcessing(
                single=" ".join(part for part in (before, "$A", after) if part),
                special_tokens=[(token, vocabulary[token]) for token in (before, after) if token],
            )
        named = {"eos_token": eos} if eos else {}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **named)
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        return tokenizer

    return build


@pytest.fixture
def facts() -> ModelFacts:
    return ModelFacts("0" * 40, "0" * 40, None, dimensions=24, context_tokens=128)


class FaultyEngine:
    """Deterministic vectors, and the faults that a test sets. Counts what it was asked to embed."""

    verified = True

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.embedded: list[tuple[int, ...]] = []
        self.alive = True
        self.spoil: Callable[[np.ndarray], np.ndarray] = lambda vectors: vectors
        self.before: Callable[[], Any] | None = None

    async def start(self) -> None:
        self.alive = True

    async def embed(self, inputs: Sequence[list[int]]) -> np.ndarray:
        if self.before is not None:
            await self.before()
        if not self.alive:
            raise EngineUnavailable("the engine is dead")
        self.embedded += [tuple(ids) for ids in inputs]
        drawn = [np.random.default_rng(sum(i * 31**n for n, i in enumerate(ids)) % 2**32) for ids in inputs]
        return self.spoil(
            np.stack([rng.normal(size=self.recipe.dimensions) for rng in drawn]).astype(np.float32)
        )

    def healthy(self) -> bool:
        return self.alive

    async def aclose(self) -> None:
        self.alive = False

    def describe(self) -> dict[str, str]:
        return {"engine": "faulty", "version": "1"}


@pytest.fixture
def faulty_engine(recipe: Recipe) -> FaultyEngine:
    return FaultyEngine(recipe)


@pytest.fixture
def captions_file(tmp_path: Path) -> Callable[[Sequence[str]], Path]:
    def write(captions: Sequence[str]) -> Path:
        path = tmp_path / "captions.txt"
        path.write_text("\n".join(captions) + "\n")
        return path

    return write
