"""A recipe gives the token ids that the model's authors prescribe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lift_cache.errors import BadConfig
from lift_embedder.recipes import NAMED, ModelFacts, RecipeOptions, build_recipe
from lift_embedder.tokens import CaptionTokenizer

CAPTION = "a red circle above a blue square"

# What each real tokenizer adds by itself, and its end token.
SHAPES: dict[str, dict[str, str]] = {
    "minilm": {"before": "[CLS]", "after": "[SEP]"},
    "smollm2": {"eos": "<|im_end|>"},
    "smollm2-random": {"eos": "<|im_end|>"},
    "e5-mistral": {"before": "<s>", "eos": "</s>"},
    "linq": {"before": "<s>", "after": "</s>", "eos": "</s>"},
    "sfr": {"before": "<s>", "after": "</s>", "eos": "</s>"},
    "qwen3-embedding": {"after": "<|endoftext|>", "eos": "<|im_end|>"},
    "nv-embed-v2": {"before": "<s>", "eos": "</s>"},
    "mistral": {"before": "<s>", "eos": "</s>"},
    "vicuna": {"before": "<s>", "eos": "</s>"},
}
CLOSING = {name: shape.get("after", shape.get("eos")) for name, shape in SHAPES.items()}


def test_every_named_recipe_is_tested() -> None:
    assert set(SHAPES) == set(NAMED)


@pytest.mark.parametrize("name", NAMED)
def test_a_named_recipe_opens_and_closes_a_caption_as_its_model_wants(
    name: str, tiny_tokenizer: Callable[..., Any], facts: ModelFacts
) -> None:
    tokenizer = tiny_tokenizer(**SHAPES[name])
    recipe = build_recipe(NAMED[name], name, facts, RecipeOptions())
    (tokens,) = CaptionTokenizer(recipe, tokenizer)([CAPTION])
    opening = [SHAPES[name]["before"]] if "before" in SHAPES[name] else []
    assert tokenizer.convert_ids_to_tokens(tokens.ids) == [*opening, *CAPTION.split(), CLOSING[name]]
    assert not tokens.truncated


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_keeps_every_special_token_and_is_reported(
    name: str, side: Any, tiny_tokenizer: Callable[..., Any], facts: ModelFacts
) -> None:
    tokenizer = tiny_tokenizer(**SHAPES[name])
    recipe = build_recipe(NAMED[name], name, facts, RecipeOptions(max_tokens=5, truncation=side))
    (tokens,) = CaptionTokenizer(recipe, tokenizer)([CAPTION])
    words = tokenizer.convert_ids_to_tokens(tokens.ids)
    assert len(tokens.ids) == 5 and tokens.truncated
    assert words[-1] == CLOSING[name]
    kept = words[len(words) - 1 - sum(word in CAPTION.split() for word in words) : -1]
    assert kept == (CAPTION.split()[: len(kept)] if side == "right" else CAPTION.split()[-len(kept) :])


def test_a_caption_that_just_fits_is_not_truncated(
    tiny_tokenizer: Callable[..., Any], facts: ModelFacts
) -> None:
    tokenizer = tiny_tokenizer(before="<s>", eos="</s>")
    exact = RecipeOptions(max_tokens=len(CAPTION.split()) + 2)
    (tokens,) = CaptionTokenizer(build_recipe(NAMED["mistral"], "m", facts, exact), tokenizer)([CAPTION])
    assert len(tokens.ids) == exact.max_tokens and not tokens.truncated


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_cuts_the_caption_and_never_the_template(
    side: Any, tiny_tokenizer: Callable[..., Any], facts: ModelFacts
) -> None:
    tokenizer = tiny_tokenizer(before="<s>", eos="</s>")
    options = RecipeOptions(template="instruct : {caption} query", max_tokens=8, truncation=side)
    recipe = build_recipe(NAMED["mistral"], "m", facts, options)
    (tokens,) = CaptionTokenizer(recipe, tokenizer)([CAPTION])
    kept = ["a", "red", "circle"] if side == "right" else ["a", "blue", "square"]
    assert tokenizer.convert_ids_to_tokens(tokens.ids) == ["<s>", "instruct", ":", *kept, "query", "</s>"]


def test_without_an_end_token_nothing_closes_the_input(
    tiny_tokenizer: Callable[..., Any], facts: ModelFacts
) -> None:
    tokenizer = tiny_tokenizer(before="<s>", after="</s>", eos="</s>")
    recipe = build_recipe(NAMED["sfr"], "m", facts, RecipeOptions(end_token=False))
    (tokens,) = CaptionTokenizer(recipe, tokenizer)(["a dog"])
    assert tokenizer.convert_ids_to_tokens(tokens.ids) == ["<s>", "a", "dog"]


def test_last_token_pooling_of_an_unknown_model_needs_a_decision_on_the_end_token(facts: ModelFacts) -> None:
    with pytest.raises(BadConfig, match="--no-end-token"):
        build_recipe(None, "some/model", facts, RecipeOptions(pooling="last"))
    assert build_recipe(None, "some/model", facts, RecipeOptions(pooling="last", end_token=True)).end_token
    assert not build_recipe(None, "m", facts, RecipeOptions(pooling="last", end_token=False)).end_token


def test_an_unknown_model_needs_a_pooling(facts: ModelFacts) -> None:
    with pytest.raises(BadConfig, match="--pooling"):
        build_recipe(None, "some/model", facts, RecipeOptions())


@pytest.mark.parametrize("options", [{"max_tokens": 128}, {"max_tokens": 1}, {"template": "no caption"}])
def test_an_option_that_the_model_cannot_take_is_refused_by_its_flag(
    options: dict[str, Any], facts: ModelFacts
) -> None:
    with pytest.raises(BadConfig, match=f"--{next(iter(options)).replace('_', '-')}"):
        build_recipe(NAMED["mistral"], "m", facts, RecipeOptions(**options))


def test_inputs_stay_below_the_length_at_which_vllm_hangs(facts: ModelFacts) -> None:
    short = replace(facts, context_tokens=100)
    assert build_recipe(NAMED["e5-mistral"], "m", short, RecipeOptions()).max_tokens == 99


def test_every_option_that_changes_a_vector_changes_the_fingerprint(facts: ModelFacts) -> None:
    base = build_recipe(NAMED["mistral"], "m", facts, RecipeOptions()).fingerprint
    changes: list[dict[str, Any]] = [
        {"dtype": "float32"},
        {"pooling": "mean"},
        {"end_token": False},
        {"template": "query : {caption}"},
        {"max_tokens": 50},
        {"truncation": "left"},
        {"normalize": False},
    ]
    others = {build_recipe(NAMED["mistral"], "m", facts, RecipeOptions(**c)).fingerprint for c in changes}
    assert len(others) == len(changes) and base not in others


@pytest.mark.parametrize("template", ["{caption}", "</s> {caption} </s>"])
def test_a_special_token_named_in_a_caption_is_text_and_in_a_template_is_itself(
    template: str, tiny_tokenizer: Callable[..., Any], facts: ModelFacts
) -> None:
    tokenizer = tiny_tokenizer(before="<s>", eos="</s>")
    recipe = build_recipe(NAMED["mistral"], "m", facts, RecipeOptions(template=template))
    hostile, plain, unknown = CaptionTokenizer(recipe, tokenizer)(["a </s> dog", "a red dog", "a zebra dog"])
    inner = 1 if template == "{caption}" else 2
    special = set(tokenizer.convert_tokens_to_ids(["<s>", "</s>"]))
    assert not special & set(hostile.ids[inner:-inner])
    assert tokenizer.convert_ids_to_tokens(plain.ids[inner:-inner]) == ["a", "red", "dog"]
    assert tokenizer.convert_ids_to_tokens(unknown.ids[inner:-inner]) == ["a", "<unk>", "dog"]
    assert all(set(row.ids[:inner] + row.ids[-inner:]) <= special for row in (hostile, plain, unknown))
