"""The nearest cached captions: exact, over all that a serving cache has, within bounds that the answer names."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lift_cache.encoding import Encoding
from lift_cache.errors import CacheDamaged
from lift_cache.keys import caption_key
from lift_cache.reader import CacheReader
from lift_cache.recipe import Recipe
from lift_cache.segment import captions_path
from lift_cache.tools.lookup import mean_direction, nearest
from lift_cache.writer import CacheWriter, Rows
from lift_embedder import neighbours
from lift_embedder.neighbours import LEAST_ROWS, Search, search
from lift_embedder.queue import QueueFull

pytestmark = pytest.mark.slow

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
def cache(tmp_path: Path, recipe: Recipe) -> Iterator[CacheWriter]:
    encoding = Encoding(dtype="float32", dimensions=DIMENSIONS)
    with CacheWriter.open(tmp_path / "cache", recipe, encoding) as cache:
        yield cache


Fill = Callable[..., None]


@pytest.fixture
def fill(cache: CacheWriter, cone: np.ndarray) -> Fill:
    def put(start: int = 0, stop: int = ROWS, *, vectors: np.ndarray = cone, step: int = 50) -> None:
        for at in range(start, stop, step):
            here = slice(at, min(at + step, stop))
            n = len(CAPTIONS[here])
            cache.put(Rows(CAPTIONS[here], vectors[here], np.full(n, 7, np.int32), np.zeros(n, bool)))

    return put


def near(cache: CacheWriter, vector: np.ndarray, k: int = 5, **options: Any) -> list[str | None]:
    return [one.caption for one in search(cache, vector, k, **options).near]


def brute(cone: np.ndarray, row: int, k: int, *, centre: bool) -> list[str]:
    unit = cone / np.linalg.norm(cone, axis=1, keepdims=True)
    if centre:
        unit = unit - unit.mean(0)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    order = np.argsort(-(unit @ unit[row]), kind="stable")
    return [CAPTIONS[i] for i in order if i != row][:k]


@pytest.mark.parametrize("sealed", [0, 100, 300])
@pytest.mark.parametrize("centre", [True, False])
def test_sealed_and_fresh_captions_are_found_without_any_snapshot(
    sealed: int, centre: bool, cache: CacheWriter, fill: Fill, cone: np.ndarray
) -> None:
    for start in range(0, sealed, 50):
        fill(start, start + 50)
        cache.seal()
    fill(sealed)
    for row in (0, 120, 299):
        found = search(cache, cone[row], 5, leave_out=caption_key(CAPTIONS[row]), centre=centre)
        assert [one.caption for one in found.near] == brute(cone, row, 5, centre=centre)
        assert (found.scanned, found.rows, found.centred) == (ROWS, ROWS, centre)
        assert found.near[0].tokens == 7


def test_it_ranks_as_lift_cache_lookup_does(cache: CacheWriter, fill: Fill, cone: np.ndarray) -> None:
    fill()
    cache.snapshot()
    reader = CacheReader(cache.path)
    for mean in (mean_direction(reader), None):
        pairs = nearest(reader, cone[0], 11, mean=mean)
        found = search(cache, cone[0], 11, centre=mean is not None)
        assert [one.caption for one in found.near] == reader.captions(np.array([row for row, _ in pairs]))
        shown = [one.cosine if one.centred is None else one.centred for one in found.near]
        assert np.allclose(shown, [cosine for _, cosine in pairs], atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 40), block=st.integers(1, 400), centre=st.booleans())
def test_neighbours_are_those_of_comparing_everything_whatever_is_read_at_a_time(
    seed: int, k: int, block: int, centre: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(LEAST_ROWS, 200))
    drawn = (rng.normal(size=(n, DIMENSIONS)) + 3).astype(np.float32)
    fields = {"revision": "0" * 40, "dtype": "float32", "tokenizer_revision": "0" * 40, "end_token": True}
    recipe = Recipe(model="m", pooling="last", max_tokens=77, normalize=True, dimensions=DIMENSIONS, **fields)
    path = tmp_path_factory.mktemp("c") / "cache"
    with (
        pytest.MonkeyPatch.context() as patch,
        CacheWriter.open(path, recipe, Encoding(dtype="float32", dimensions=DIMENSIONS)) as cache,
    ):
        patch.setattr(neighbours, "BLOCK_VALUES", block * DIMENSIONS)
        for start in range(0, n, 37):
            rows = np.arange(start, min(start + 37, n))
            texts = [CAPTIONS[i] for i in rows]
            cache.put(Rows(texts, drawn[rows], np.ones(len(rows), np.int32), np.zeros(len(rows), bool)))
            if rng.random() < 0.5:
                cache.seal()
        row = int(rng.integers(n))
        found = near(cache, drawn[row], k, leave_out=caption_key(CAPTIONS[row]), centre=centre)
    assert found == brute(drawn, row, min(k, n - 1), centre=centre)


def test_a_caption_in_two_segments_is_shown_once(
    tmp_path: Path, recipe: Recipe, cache: CacheWriter, fill: Fill, cone: np.ndarray
) -> None:
    fill(0, 200)
    cache.seal()
    with CacheWriter.open(tmp_path / "other", recipe, cache.encoding) as other:
        texts = CAPTIONS[100:]
        other.put(Rows(texts, cone[100:], np.ones(200, np.int32), np.zeros(200, bool)))
        other.seal()
    cache.merge(tmp_path / "other")
    found = search(cache, cone[150], 299, leave_out=caption_key(CAPTIONS[150]))
    assert len({one.key for one in found.near}) == len(found.near) == ROWS - 1
    assert found.scanned == found.rows == ROWS


def test_beyond_the_limit_an_even_share_is_compared_and_the_answer_says_so(
    cache: CacheWriter, fill: Fill, cone: np.ndarray
) -> None:
    for start in range(0, ROWS, 100):
        fill(start, start + 100)
        cache.seal()
    found = search(cache, cone[0], 200, most_bytes=150 * DIMENSIONS * 4)
    assert 145 <= found.scanned <= 155 and found.rows == ROWS
    thirds = [int((one.caption or "").split()[3]) // 100 for one in found.near]
    assert np.bincount(thirds).min() > 40


def test_a_search_ends_when_its_time_is_up_or_its_caller_has_gone(
    cache: CacheWriter, fill: Fill, cone: np.ndarray
) -> None:
    fill()
    cache.seal()
    gone = threading.Event()
    gone.set()
    for options in ({"seconds": 0.0}, {"stop": gone}):
        found = search(cache, cone[0], 5, **options)
        assert found.scanned < found.rows == ROWS


def test_a_mean_of_a_few_captions_is_not_taken_off(cache: CacheWriter, fill: Fill, cone: np.ndarray) -> None:
    fill(0, LEAST_ROWS - 1)
    assert not search(cache, cone[0], 3).centred
    fill(LEAST_ROWS - 1, LEAST_ROWS)
    found = search(cache, cone[0], 3)
    assert found.centred and all(one.centred is not None for one in found.near)


def test_rows_sealed_and_compacted_during_a_search_are_not_missed(
    cache: CacheWriter, fill: Fill, cone: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill()
    listed = cache.fresh_rows

    def seal_meanwhile() -> Iterator[Any]:
        for number, rows in enumerate(listed()):
            if number == 2:
                cache.snapshot()
            yield rows

    monkeypatch.setattr(cache, "fresh_rows", seal_meanwhile)
    # Rows that were read in both places count twice in the mean, so the plain cosine is compared here.
    found = near(cache, cone[0], 50, leave_out=caption_key(CAPTIONS[0]), centre=False)
    assert found == brute(cone, 0, 50, centre=False)


def test_a_copy_without_captions_shows_keys(cache: CacheWriter, fill: Fill, cone: np.ndarray) -> None:
    fill()
    cache.seal()
    for segment in cache.segments():
        captions_path(segment.directory, segment.id).unlink()
    found = search(cache, cone[0], 3, leave_out=caption_key(CAPTIONS[0])).near
    assert found[0].caption is None and found[0].key == caption_key(CAPTIONS[1])


def test_a_damaged_neighbour_is_an_error_and_never_shown(
    cache: CacheWriter, fill: Fill, cone: np.ndarray
) -> None:
    fill()
    cache.seal()
    path = cache.segments()[0].path
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    twin = content.find(cone[1].tobytes())
    content[twin : twin + 1] = bytes([content[twin] ^ 1])
    path.write_bytes(content)
    with pytest.raises(CacheDamaged, match="fails its checksum"):
        search(cache, cone[0], 3)


async def ask(searching: Search, vector: np.ndarray) -> Any:
    return await searching(vector, 3, leave_out=b"", centre=True)


def test_one_search_at_a_time_the_next_is_refused_and_a_caller_that_leaves_frees_the_place(
    cache: CacheWriter, fill: Fill, cone: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill()
    running, go_on = threading.Event(), threading.Event()
    listed = cache.fresh_rows

    def wait() -> Iterator[Any]:
        running.set()
        go_on.wait(10)
        yield from listed()

    monkeypatch.setattr(cache, "fresh_rows", wait)

    async def scene() -> None:
        searching = Search(cache)
        first = asyncio.create_task(ask(searching, cone[0]))
        await asyncio.to_thread(running.wait, 10)
        with pytest.raises(QueueFull) as refused:
            await ask(searching, cone[1])
        assert refused.value.retry_after == 1
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        with pytest.raises(QueueFull):  # its thread has not noticed yet
            await ask(searching, cone[1])
        go_on.set()
        for _ in range(1000):
            try:
                found = await ask(searching, cone[1])
                break
            except QueueFull:
                await asyncio.sleep(0.01)
        assert found.scanned == ROWS

    asyncio.run(scene())
