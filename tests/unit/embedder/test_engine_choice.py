"""`--engine auto` takes vLLM where it loads, and says so where it does not."""

from __future__ import annotations

import importlib.util
import logging
import sys

import pytest

from lift_cache.errors import BadConfig, EngineUnavailable
from lift_cache.recipe import Recipe
from lift_embedder.engines import resolve_kind

pytestmark = pytest.mark.slow


def test_auto_takes_vllm_where_it_is_installed(recipe: Recipe) -> None:
    assert resolve_kind("auto", recipe) == "vllm"


def test_auto_falls_back_where_vllm_does_not_load_and_says_so(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load = importlib.import_module

    def broken(name: str, package: str | None = None) -> object:
        if name.endswith("vllm_engine"):
            raise ImportError("undefined symbol")
        return load(name, package)

    monkeypatch.setattr("importlib.import_module", broken)
    with caplog.at_level(logging.WARNING):
        assert resolve_kind("auto", recipe) == "transformers"
    assert "vLLM does not load (undefined symbol); falling back to --engine transformers" in caplog.text


def test_an_engine_that_is_not_installed_is_one_line_that_says_what_to_install(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    with pytest.raises(EngineUnavailable, match=r"pip install 'lift-embedder\[vllm\]'"):
        resolve_kind("vllm", recipe)
    with caplog.at_level(logging.WARNING):
        assert resolve_kind("auto", recipe) == "transformers"
    assert "vLLM is not installed" in caplog.text


def test_a_model_that_pools_in_its_own_code_needs_the_transformers_engine(recipe: Recipe) -> None:
    own = recipe.model_copy(update={"pooling": "model"})
    assert resolve_kind("auto", own) == "transformers"
    with pytest.raises(BadConfig, match="--engine transformers"):
        resolve_kind("vllm", own)


def test_a_recipe_that_no_engine_can_follow_is_refused(recipe: Recipe) -> None:
    with pytest.raises(BadConfig, match="last layer"):
        resolve_kind("auto", recipe.model_copy(update={"hidden_layer": -2}))


def test_vllm_that_was_asked_for_and_does_not_load_is_one_line(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str, package: str | None = None) -> object:
        raise ImportError("undefined\nsymbol")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(EngineUnavailable, match=r"vLLM does not load \(undefined symbol\)"):
        resolve_kind("vllm", recipe)
