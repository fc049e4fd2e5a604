"""What every engine promises, and the choice between them."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from lift_cache.errors import BadConfig, EngineUnavailable
from lift_cache.recipe import Recipe
from lift_embedder.runtime import prepare_for_engine

if TYPE_CHECKING:
    from lift_embedder.engines.openai_engine import Fleet

EngineKind = Literal["auto", "vllm", "transformers", "openai"]
Chosen = Literal["vllm", "transformers", "openai"]

log = logging.getLogger(__name__)


class Engine(Protocol):
    """One loaded model. Its methods run on the event loop that called `start`.

    An engine that has failed stays failed: close it and create another.
    """

    verified: bool
    """Whether the engine loads the weights that the recipe names. One that does not may add to a cache that was
    filled by one that does, when the canaries agree, but never sets that cache's standard."""

    async def start(self) -> None:
        """Load the model. Raises EngineUnavailable."""

    async def embed(self, inputs: Sequence[list[int]]) -> np.ndarray:
        """Token ids of n texts to float32 [n, recipe.dimensions].

        The vector of a text does not depend on what else is in the call; it is NaN for a text that the engine
        does not take. Raises EngineUnavailable.
        """

    def healthy(self) -> bool:
        """Whether the next `embed` has a chance."""

    async def aclose(self) -> None:
        """Stop, together with every process that was started. Never raises."""

    def describe(self) -> dict[str, str]:
        """Software, versions and device: provenance of the vectors, beside the recipe."""


def resolve_kind(kind: EngineKind, recipe: Recipe) -> Chosen:
    """Settle `auto`: vLLM, unless it is not installed, does not load, or does not serve this kind of model.

    Raises:
        BadConfig: a recipe that the engine cannot follow.
        EngineUnavailable: the engine's software is not installed or does not load.
    """
    if recipe.hidden_layer != -1 or not recipe.final_norm:
        raise BadConfig(
            "the engines read the last layer after the final norm; the recipe asks for another state"
        )
    if kind == "openai":
        return kind
    if recipe.pooling == "model":
        if kind == "vllm":
            raise BadConfig(
                f"{recipe.model} pools in its own code, which vLLM does not run: use --engine transformers"
            )
        kind = "transformers"
    prepare_for_engine()
    if kind != "auto":
        return _loaded(kind)
    if importlib.util.find_spec("vllm") is None:
        log.warning("vLLM is not installed; falling back to --engine transformers")
        return _loaded("transformers")
    try:
        return _loaded("vllm")
    except EngineUnavailable as error:
        log.warning("%s; falling back to --engine transformers", error)
        return _loaded("transformers")


def _loaded(kind: Literal["vllm", "transformers"]) -> Literal["vllm", "transformers"]:
    if importlib.util.find_spec(kind) is None:
        raise EngineUnavailable(
            f"{kind} is not installed; pip install 'lift-embedder[{kind}]' or use another --engine"
        )
    name = {"vllm": "vLLM", "transformers": "transformers"}[kind]
    try:
        # Our module imports what it uses; `import vllm` alone loads next to nothing.
        importlib.import_module(f"lift_embedder.engines.{kind}_engine")
    except Exception as error:  # whatever a broken installation raises
        said = " ".join(str(error).split()) or type(error).__name__
        raise EngineUnavailable(f"{name} does not load ({said})") from error
    return kind


def create_engine(
    kind: Chosen, model: Path, recipe: Recipe, *, batch_tokens: int, fleet: Fleet | None = None
) -> Engine:
    """An engine that is not started yet, of a kind that `resolve_kind` has settled.

    Args:
        model: folder with weights, config and tokenizer.
        batch_tokens: tokens that the engine computes at a time.
        fleet: the servers of the engine `openai`.
    """
    if kind == "openai":
        from lift_embedder.engines.openai_engine import OpenAIEngine

        assert fleet is not None
        return OpenAIEngine(recipe, fleet)
    prepare_for_engine()
    if kind == "vllm":
        from lift_embedder.engines.vllm_engine import VllmEngine

        return VllmEngine(model, recipe, batch_tokens=batch_tokens)
    from lift_embedder.engines.transformers_engine import TransformersEngine

    return TransformersEngine(model, recipe, batch_tokens=batch_tokens)
