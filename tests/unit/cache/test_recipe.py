"""A recipe says everything that can change a vector, and another one is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from lift_cache.errors import CacheDamaged, RecipeMismatch, UnsupportedFormat
from lift_cache.recipe import Recipe


def changed(recipe: Recipe, field: str) -> Recipe:
    now = getattr(recipe, field)
    other: object
    if field == "pooling":
        other = "mean"
    elif field == "dtype":
        other = "bfloat16"
    elif field == "truncation":
        other = "left"
    elif field == "template":
        other = "query: {caption}"
    elif isinstance(now, bool):
        other = not now
    elif isinstance(now, int):
        other = now + 1
    elif isinstance(now, dict):
        other = {"rope_theta": 5.0}
    else:
        other = f"{now}x"
    return recipe.model_copy(update={field: other})


@pytest.mark.parametrize("field", [name for name in Recipe.model_fields if name != "version"])
def test_every_field_changes_the_fingerprint_and_is_named_when_it_differs(recipe: Recipe, field: str) -> None:
    other = changed(recipe, field)
    assert other.fingerprint != recipe.fingerprint
    with pytest.raises(RecipeMismatch) as refused:
        recipe.require_same(other, here="the cache", there="the server")
    assert refused.value.field == field
    for value in (getattr(recipe, field), getattr(other, field)):
        assert repr(value) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_fingerprint_of_a_recipe_never_changes(recipe: Recipe) -> None:
    # Literal on purpose: it stands in every file of every cache.
    assert recipe.fingerprint == "6638e9eb9a9fb0d669ff51e4afaea818ee0db87497faa9956fbd0dc8f64ff869"


def test_a_recipe_survives_its_file(recipe: Recipe, tmp_path: Path) -> None:
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_a_newer_recipe_version_is_said_to_be_newer(recipe: Recipe) -> None:
    data = json.loads(recipe.canonical_json()) | {"version": 2, "unknown": 1}
    with pytest.raises(UnsupportedFormat, match="recipe version 2"):
        Recipe.parse(json.dumps(data), where="recipe.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', "nonsense", '{"version": 1, "model": 3}'])
def test_a_file_that_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(CacheDamaged, match=r"^recipe\.json"):
        Recipe.parse(text, where="recipe.json")


@pytest.mark.parametrize("template", ["", "no place", "{caption} {caption}"])
def test_a_template_has_one_place_for_the_caption(recipe: Recipe, template: str) -> None:
    with pytest.raises(ValidationError, match="exactly once"):
        Recipe.model_validate(recipe.model_dump() | {"template": template})


def test_the_caption_is_normalised_before_it_meets_the_template(recipe: Recipe) -> None:
    instruct = recipe.model_copy(update={"template": "Describe: {caption}\n"})
    assert instruct.render("  two\tdogs ") == "Describe: two dogs\n"
