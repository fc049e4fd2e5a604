"""`lift-cache lookup`: is a caption there, what is known of it, what is near it."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cyclopts import App

from lift_cache.bulk import write_cache
from lift_cache.encoding import Encoding
from lift_cache.keys import caption_key
from lift_cache.reader import CacheReader
from lift_cache.recipe import Recipe
from lift_cache.terminal import run_command
from lift_cache.tools import lookup as tool
from lift_cache.tools.lookup import lookup, mean_direction, nearest

ROWS, DIMENSIONS = 300, 24
CAPTIONS = [f"a photo of {number} dogs" for number in range(ROWS)]


@pytest.fixture
def cone(vectors: Callable[..., np.ndarray]) -> np.ndarray:
    """Vectors as a language model gives them: a large part that all share. Row 1 is row 0's near twin."""
    own = vectors(ROWS, dimensions=DIMENSIONS)
    own[1] = own[0] + 0.1 * own[1]
    shared = np.zeros(DIMENSIONS, np.float32)
    shared[0] = 9
    return own + shared


@pytest.fixture
def cache(tmp_path: Path, recipe: Recipe, cone: np.ndarray) -> Path:
    """Several segments."""
    encoding = Encoding(dtype="float32", dimensions=DIMENSIONS)
    tokens, truncated = np.arange(ROWS), np.arange(ROWS) == 2
    write_cache(
        tmp_path / "cache", recipe, encoding, CAPTIONS, cone, tokens, truncated, segment_rows=ROWS // 3
    )
    return tmp_path / "cache"


def run(*argv: str) -> int:
    """Exit status."""
    app = App(name="lift-cache")
    app.command(lookup)
    try:
        run_command(app, ["lookup", *argv], interrupted="")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture
def answered(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def answer(*argv: str) -> dict[str, Any]:
        status = run(*argv, "--json")
        found = json.loads(capsys.readouterr().out)
        assert status == (0 if all(one["found"] for one in found["captions"]) else 1)
        return found

    return answer


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_a_cached_caption_is_shown_with_all_that_is_stored_of_it(
    cache: Path, cone: np.ndarray, answered: Callable[..., dict[str, Any]]
) -> None:
    found = answered(str(cache), CAPTIONS[2], CAPTIONS[7], "--neighbours", "0")
    assert found["rows"] == ROWS
    two, seven = found["captions"]
    assert two["key"] == caption_key(CAPTIONS[2]).hex()
    assert (two["tokens"], two["truncated"]) == (2, True)
    assert (seven["tokens"], seven["truncated"]) == (7, False)
    assert two["norm"] == pytest.approx(float(np.linalg.norm(cone[2])))
    assert two["neighbours"] is None
    assert CacheReader(cache).captions(np.array([two["row"], seven["row"]])) == [CAPTIONS[2], CAPTIONS[7]]


def test_a_caption_is_found_in_another_spelling_of_its_spaces_and_the_difference_is_shown(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(cache), f"  {CAPTIONS[3].replace(' ', '   ')}\n", "--neighbours", "0") == 0
    assert f"{CAPTIONS[3]}   (normalised)" in capsys.readouterr().out
    assert run(str(cache), CAPTIONS[3], "--neighbours", "0") == 0
    assert "normalised" not in capsys.readouterr().out


def test_a_missing_caption_is_said_to_be_missing_with_how_to_embed_it(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(cache), CAPTIONS[0], "a cat") == 1
    out = capsys.readouterr().out
    assert f"not in snapshot {CacheReader(cache).snapshot_id}, which has 300 captions" in out
    assert caption_key("a cat").hex() in out
    assert f"lift-embed serve --cache {cache} --model tests/tiny" in out
    assert "lift-embed fill" in out
    assert "row" in out, "the one that is there is shown all the same"


def test_neighbours_are_found_where_plain_cosines_tell_little(
    cache: Path, answered: Callable[..., dict[str, Any]]
) -> None:
    near = answered(str(cache), CAPTIONS[0], "--neighbours", "5")["captions"][0]["neighbours"]
    assert len(near) == 5
    assert near[0]["caption"] == CAPTIONS[1]
    assert min(one["cosine"] for one in near) > 0.98
    assert near[0]["centred"] > 0.95 > 0.8 > near[1]["centred"]


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("k", [1, 10, ROWS, ROWS + 5])
def test_the_nearest_rows_are_those_of_a_search_through_the_whole_matrix(
    k: int, centred: bool, cache: Path, monkeypatch: pytest.MonkeyPatch, vectors: Callable[..., np.ndarray]
) -> None:
    monkeypatch.setattr(tool, "BLOCK_VALUES", 37 * DIMENSIONS)
    reader = CacheReader(cache)
    whole = unit(reader.gather(np.arange(ROWS)))
    mean = mean_direction(reader) if centred else None
    asked = 3 * vectors(1, seed=5, dimensions=DIMENSIONS)[0]
    if mean is not None:
        assert mean == pytest.approx(whole.mean(0), abs=1e-6)
        cosines = unit(whole - mean) @ unit(unit(asked) - mean)
    else:
        cosines = whole @ unit(asked)
    rows, found = zip(*nearest(reader, asked, k, mean=mean), strict=True)
    assert list(rows) == np.argsort(-cosines)[:k].tolist()
    assert found == pytest.approx(np.sort(cosines)[::-1][:k].tolist(), abs=1e-5)


def test_a_search_holds_a_block_of_vectors_in_memory_and_not_the_cache(
    tmp_path: Path, recipe: Recipe, vectors: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, dimensions = 20_000, 128
    made = vectors(rows, dimensions=dimensions)
    recipe = recipe.model_copy(update={"dimensions": dimensions})
    captions = [str(number) for number in range(rows)]
    write_cache(tmp_path / "cache", recipe, Encoding(dtype="float16", dimensions=dimensions), captions, made)
    reader = CacheReader(tmp_path / "cache")
    monkeypatch.setattr(tool, "BLOCK_VALUES", 256 * dimensions)
    tracemalloc.start()
    try:
        assert len(nearest(reader, made[0], 10)) == 10
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < made.nbytes / 8


def test_a_copy_without_captions_shows_keys(
    cache: Path, answered: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (cache / "segments").glob("*.captions.arrow"):
        path.unlink()
    near = answered(str(cache), CAPTIONS[0], "--neighbours", "1")["captions"][0]["neighbours"]
    assert near[0]["caption"] is None
    assert near[0]["key"] == caption_key(CAPTIONS[1]).hex()
    assert run(str(cache), CAPTIONS[0], "--neighbours", "1") == 0
    assert near[0]["key"] in capsys.readouterr().out


def test_captions_cannot_act_on_the_terminal(
    tmp_path: Path, recipe: Recipe, vectors: Callable[..., np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = [
        "\x1b]0;owned\x07\x1b[31mred",
        "right\u202eto left",
        "[bold red]markup[/]",
        "ein schöner Hund 犬",
    ]
    recipe_encoding = Encoding(dtype="float32", dimensions=DIMENSIONS)
    write_cache(tmp_path / "cache", recipe, recipe_encoding, hostile, vectors(4, dimensions=DIMENSIONS))
    assert run(str(tmp_path / "cache"), hostile[0]) == 0
    out = capsys.readouterr().out
    assert r"\x1b]0;owned\x07\x1b[31mred" in out
    assert r"right\u202eto left" in out
    assert "[bold red]markup[/]" in out
    assert "ein schöner Hund 犬" in out
    assert not {"\x1b", "\x07", "\u202e"} & set(out)


def test_a_cache_of_one_caption_has_no_neighbours(
    tmp_path: Path,
    recipe: Recipe,
    vectors: Callable[..., np.ndarray],
    answered: Callable[..., dict[str, Any]],
) -> None:
    encoding = Encoding(dtype="float32", dimensions=DIMENSIONS)
    write_cache(tmp_path / "cache", recipe, encoding, ["a dog"], vectors(1, dimensions=DIMENSIONS))
    assert answered(str(tmp_path / "cache"), "a dog")["captions"][0]["neighbours"] == []


def test_every_mistake_is_one_line(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, expected in {
        (str(tmp_path / "nothing"), "a dog"): "nothing",
        (f"{cache}@999999", "a dog"): "999999",
        (str(cache),): "name at least one caption",
        (str(cache), " \n"): "the caption is empty",
        (str(cache), "a dog", "--neighbours", "-1"): "0 or more",
    }.items():
        assert run(*argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert expected in error
        assert error.count("\n") == 1, error
