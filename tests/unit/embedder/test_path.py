"""The way of a caption through the cache and an engine that may fail."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lift_cache.errors import BadCaption, EngineUnavailable, VectorRejected
from lift_cache.recipe import Recipe
from lift_cache.writer import CacheWriter
from lift_embedder.metrics import Metrics
from lift_embedder.path import BadRow, EmbeddingPath
from lift_embedder.queue import Queue, QueueFull
from lift_embedder.supervisor import Supervisor
from lift_embedder.tokens import CaptionTokenizer

Scenario = Callable[[EmbeddingPath], Awaitable[None]]


@pytest.fixture
def play(
    tmp_path: Path, recipe: Recipe, faulty_engine: Any, tiny_tokenizer: Callable[..., Any]
) -> Callable[..., None]:
    """Run a scenario on a path with a real cache."""
    tokenizer = CaptionTokenizer(recipe, tiny_tokenizer(eos="</s>"))

    def run(
        scenario: Scenario,
        *,
        queue_tokens: int = 10_000,
        batch_tokens: int = 1_000,
        batch_seconds: float = 20,
    ) -> None:
        async def main() -> None:
            metrics = Metrics()
            with CacheWriter.open(tmp_path / "cache", recipe) as cache:
                supervisor = Supervisor(
                    lambda: faulty_engine, tokenizer, cache, metrics, batch_seconds=batch_seconds
                )
                queue = Queue(most_tokens=queue_tokens, most_bytes=1 << 24, batch_tokens=batch_tokens)
                path = EmbeddingPath(cache, tokenizer, supervisor, metrics, queue)
                path.start()
                try:
                    async with asyncio.timeout(20):
                        while not supervisor.ready:
                            await asyncio.sleep(0.01)
                        faulty_engine.embedded.clear()
                        await scenario(path)
                finally:
                    await path.aclose()

        asyncio.run(main())

    return run


def test_a_hit_is_the_same_bits_as_the_miss_before_it(play: Callable[..., None], faulty_engine: Any) -> None:
    async def scenario(path: EmbeddingPath) -> None:
        missed = await path.embed(["a dog", "a cat"])
        hit = await path.embed(["a cat", " a   dog "])
        assert not missed.cached.any() and hit.cached.all()
        assert np.array_equal(hit.vectors, missed.vectors[::-1])
        assert np.array_equal(hit.vectors, hit.vectors.astype(np.float16).astype(np.float32))
        assert len(faulty_engine.embedded) == 2

    play(scenario)


def test_equal_captions_in_flight_are_computed_once(play: Callable[..., None], faulty_engine: Any) -> None:
    async def scenario(path: EmbeddingPath) -> None:
        answers = await asyncio.gather(*(path.embed(["a dog", "a cat", "a dog"]) for _ in range(20)))
        assert len(faulty_engine.embedded) == 2
        assert all(np.array_equal(answer.vectors, answers[0].vectors) for answer in answers)

    play(scenario)


def test_a_caller_who_goes_away_does_not_take_the_answer_from_others(
    play: Callable[..., None], faulty_engine: Any
) -> None:
    async def scenario(path: EmbeddingPath) -> None:
        going = asyncio.Event()
        faulty_engine.before = going.wait
        first = asyncio.create_task(path.embed(["a dog"]))
        await asyncio.sleep(0.1)
        second = asyncio.create_task(path.embed(["a dog"]))
        await asyncio.sleep(0.1)
        first.cancel()
        going.set()
        assert (await second).vectors.any()
        assert len(faulty_engine.embedded) == 1

    play(scenario)


def test_captions_of_many_requests_share_batches(play: Callable[..., None]) -> None:
    async def scenario(path: EmbeddingPath) -> None:
        await asyncio.gather(*(path.embed([f"a dog{' the' * n}"]) for n in range(60)))
        batches = path._metrics.registry.get_sample_value("lift_batch_rows_count")
        assert batches is not None and batches < 60

    play(scenario)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9, "zero"])
def test_a_vector_that_cannot_be_vouched_for_is_refused_alone_and_never_stored(
    bad: Any, play: Callable[..., None], faulty_engine: Any
) -> None:
    def spoil(vectors: np.ndarray) -> np.ndarray:
        vectors[-1] = 0 if bad == "zero" else vectors[-1]
        if bad != "zero":
            vectors[-1, 3] = bad
        return vectors

    async def scenario(path: EmbeddingPath) -> None:
        faulty_engine.spoil = spoil
        with pytest.raises(BadRow) as refused:
            await path.embed(["a dog"])
        assert isinstance(refused.value.cause, VectorRejected) and refused.value.index == 0
        faulty_engine.spoil = lambda vectors: vectors
        assert path.cache.rows == 0
        assert not (await path.embed(["a dog"])).cached.any()

    play(scenario)


def test_vectors_of_the_wrong_dimension_are_never_stored(
    play: Callable[..., None], faulty_engine: Any
) -> None:
    async def scenario(path: EmbeddingPath) -> None:
        faulty_engine.spoil = lambda vectors: np.hstack([vectors, vectors])
        with pytest.raises(BadRow, match="shape"):
            await path.embed(["a dog"])
        assert path.cache.rows == 0

    play(scenario)


def test_a_dead_engine_leaves_hits_served_and_comes_back(
    play: Callable[..., None], faulty_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lift_embedder.supervisor.FIRST_PAUSE", 0.2)

    async def scenario(path: EmbeddingPath) -> None:
        await path.embed(["a dog"])
        faulty_engine.alive = False
        with pytest.raises(EngineUnavailable):
            await path.embed(["a dog", "a cat"])
        assert (await path.embed(["a dog"])).cached.all()
        while not (path.engine.ready and faulty_engine.alive):
            await asyncio.sleep(0.05)
        assert (await path.embed(["a cat"])).vectors.any()

    play(scenario)


def test_an_engine_that_hangs_is_given_up(play: Callable[..., None], faulty_engine: Any) -> None:
    async def scenario(path: EmbeddingPath) -> None:
        faulty_engine.before = lambda: asyncio.sleep(60)
        with pytest.raises(EngineUnavailable, match="did not answer"):
            await path.embed(["a dog"])
        faulty_engine.before = None
        assert not path.engine.ready or path.cache.rows == 0

    play(scenario, batch_seconds=0.1)


def test_an_engine_that_hangs_at_the_canaries_is_given_up(
    tmp_path: Path, recipe: Recipe, faulty_engine: Any, tiny_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = CaptionTokenizer(recipe, tiny_tokenizer(eos="</s>"))
    faulty_engine.before = lambda: asyncio.sleep(60)

    async def main() -> None:
        with CacheWriter.open(tmp_path / "cache", recipe) as cache:
            engine = Supervisor(lambda: faulty_engine, tokenizer, cache, Metrics(), batch_seconds=0.1)
            engine.start()
            async with asyncio.timeout(10):
                while "did not embed the canaries" not in engine.state["state"]:
                    await asyncio.sleep(0.02)
                faulty_engine.before = None
                while not engine.ready:
                    await asyncio.sleep(0.02)
            await engine.aclose()

    asyncio.run(main())


def test_an_engine_that_no_longer_agrees_makes_the_cache_read_only(
    play: Callable[..., None], faulty_engine: Any
) -> None:
    async def fills(path: EmbeddingPath) -> None:
        await path.embed(["a dog"])

    async def refuses(path: EmbeddingPath) -> None:
        assert "no longer agrees" in str(path.engine.read_only)
        assert (await path.embed(["a dog"])).cached.all()
        with pytest.raises(EngineUnavailable, match="read-only"):
            await path.embed(["a cat"])

    play(fills)
    faulty_engine.spoil = lambda vectors: vectors + 0.5
    play(refuses)


def test_other_token_ids_make_the_cache_read_only(play: Callable[..., None], tmp_path: Path) -> None:
    async def fills(path: EmbeddingPath) -> None:
        await path.embed(["a dog"])

    async def refuses(path: EmbeddingPath) -> None:
        assert "token ids" in str(path.engine.read_only)

    play(fills)
    canaries = tmp_path / "cache" / "canaries.json"
    canaries.write_text(canaries.read_text().replace('"token_ids":[[', '"token_ids":[[7,', 1))
    play(refuses)


def test_beyond_its_queue_a_server_refuses_and_says_when_to_come_back(
    play: Callable[..., None], faulty_engine: Any
) -> None:
    async def scenario(path: EmbeddingPath) -> None:
        going = asyncio.Event()
        faulty_engine.before = going.wait
        taken = asyncio.create_task(path.embed([f"a dog{' the' * n}" for n in range(20)]))
        await until(lambda: path.queue.rows == 20)
        with pytest.raises(QueueFull) as refused:
            await path.embed(["a cat"])
        assert refused.value.retry_after >= 1
        going.set()
        assert len((await taken).vectors) == 20
        assert (await path.embed(["a cat"])).vectors.any()

    play(scenario, queue_tokens=50)


def test_a_bad_caption_names_its_place_and_nothing_is_embedded(
    play: Callable[..., None], faulty_engine: Any
) -> None:
    async def scenario(path: EmbeddingPath) -> None:
        for bad in ("", "  ", 7, None, "\ud800"):
            with pytest.raises(BadRow, match=r"input\[1\]") as refused:
                await path.embed(["a dog", bad])
            assert isinstance(refused.value.cause, BadCaption)
        assert not faulty_engine.embedded

    play(scenario)


def test_over_long_captions_are_cut_and_marked(play: Callable[..., None]) -> None:
    async def scenario(path: EmbeddingPath) -> None:
        answer = await path.embed(["a dog", "a " * 500])
        assert answer.truncated.tolist() == [False, True]
        assert answer.tokens.tolist() == [3, path.cache.recipe.max_tokens]

    play(scenario)


def test_work_cancelled_under_the_batches_leaves_every_worker_in_place(
    play: Callable[..., None], faulty_engine: Any
) -> None:
    async def cancelled() -> None:
        raise asyncio.CancelledError

    async def scenario(path: EmbeddingPath) -> None:
        for i in range(5):
            faulty_engine.before = cancelled
            with pytest.raises(EngineUnavailable):
                await path.embed([f"a dog{' the' * i}"])
        faulty_engine.before = None
        assert (await path.embed(["a dog"])).vectors.any()

    play(scenario)


def test_a_worker_that_a_bug_ends_is_replaced(
    play: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(path: EmbeddingPath) -> None:
        for worker in tuple(path._workers):
            worker.cancel()
        await asyncio.sleep(0.05)
        assert "a batch worker ended" in caplog.text
        assert (await path.embed(["a dog"])).vectors.any()

    play(scenario)


@pytest.mark.parametrize("where", ["create", "start"])
def test_an_engine_that_fails_in_an_unforeseen_way_is_tried_again(
    where: str, play: Callable[..., None], faulty_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lift_embedder.supervisor.FIRST_PAUSE", 0.05)
    failures = [ImportError("undefined symbol"), OSError("no such device")]

    def fail_first() -> Any:
        if failures:
            raise failures.pop()
        return faulty_engine

    async def start() -> None:
        fail_first()
        faulty_engine.alive = True

    if where == "create":
        # In place of the factory that the supervisor is given.
        factory = property(lambda _: fail_first, lambda *_: None)
        monkeypatch.setattr(Supervisor, "_create", factory, raising=False)
    else:
        monkeypatch.setattr(faulty_engine, "start", start)

    async def scenario(path: EmbeddingPath) -> None:
        assert not failures and (await path.embed(["a dog"])).vectors.any()

    play(scenario)


def _lose_canaries(play: Callable[..., None], tmp_path: Path, *, sealed: bool) -> None:
    async def fills(path: EmbeddingPath) -> None:
        await path.embed([f"a dog{' the' * i}" for i in range(30)])
        if sealed:
            path.cache.seal()

    play(fills)
    (tmp_path / "cache" / "canaries.json").unlink()


def test_a_cache_without_canaries_is_checked_by_captions_that_it_holds(
    play: Callable[..., None], faulty_engine: Any, tmp_path: Path
) -> None:
    async def refuses(path: EmbeddingPath) -> None:
        assert "does not agree with the cache" in str(path.engine.read_only)
        assert not (tmp_path / "cache" / "canaries.json").exists()

    async def agrees(path: EmbeddingPath) -> None:
        assert path.engine.read_only is None
        assert (tmp_path / "cache" / "canaries.json").exists()

    _lose_canaries(play, tmp_path, sealed=True)
    faulty_engine.spoil = lambda vectors: vectors + 0.5
    play(refuses)
    faulty_engine.spoil = lambda vectors: vectors
    play(agrees)


def test_where_nothing_sealed_can_stand_in_for_canaries_the_log_says_so(
    play: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(path: EmbeddingPath) -> None:
        assert path.engine.read_only is None and "neither canaries nor sealed captions" in caplog.text

    _lose_canaries(play, tmp_path, sealed=False)
    play(scenario)


def test_canaries_of_another_recipe_make_the_cache_read_only(
    play: Callable[..., None], tmp_path: Path, recipe: Recipe
) -> None:
    async def fills(path: EmbeddingPath) -> None:
        await path.embed(["a dog"])

    async def refuses(path: EmbeddingPath) -> None:
        assert "another recipe" in str(path.engine.read_only)

    play(fills)
    canaries = tmp_path / "cache" / "canaries.json"
    canaries.write_text(canaries.read_text().replace(recipe.fingerprint, "0" * 64))
    play(refuses)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_who_leaves_gives_the_place_back_and_what_others_want_stays(
    play: Callable[..., None], faulty_engine: Any
) -> None:
    async def scenario(path: EmbeddingPath) -> None:
        going = asyncio.Event()
        faulty_engine.before = going.wait
        busy = []
        for n in range(2):  # until both workers wait for the engine
            busy.append(asyncio.create_task(path.embed([f"a dog{' the' * n}"])))
            await until(lambda n=n: path.queue.rows == n + 1 and not len(path.queue))
        leaving = asyncio.create_task(path.embed(["a cat", "a red cat"]))
        await until(lambda: len(path.queue) == 2)
        staying = asyncio.create_task(path.embed(["a red cat"]))
        await until(lambda: sum(row.waiters for row in path._in_flight.values()) == 5)
        before = path.queue.tokens
        leaving.cancel()
        await until(lambda: len(path.queue) == 1)
        assert path.queue.tokens == before - 3
        faulty_engine.before = None
        going.set()
        assert (await staying).vectors.any()
        await asyncio.gather(*busy)
        assert path.queue.tokens == path.queue.bytes == path.queue.rows == 0
        assert not (await path.embed(["a cat"])).cached.any()  # nobody computed it

    play(scenario)


def test_a_bad_row_has_its_own_error_where_the_others_are_wanted_all_the_same(
    play: Callable[..., None], faulty_engine: Any
) -> None:
    async def scenario(path: EmbeddingPath) -> None:
        answer = await path.embed(["a dog", "", "a cat", 7, "a dog"], each=True)
        assert sorted(answer.errors) == [1, 3] and isinstance(answer.errors[1], BadCaption)
        assert answer.vectors.any(1).tolist() == [True, False, True, False, True]
        nan = lambda vectors: np.where(np.arange(len(vectors))[:, None] == 0, np.nan, vectors)  # noqa: E731
        faulty_engine.spoil = nan
        answer = await path.embed(["a blue dog", "a dog"], each=True)
        assert isinstance(answer.errors[0], VectorRejected) and answer.cached.tolist() == [False, True]

    play(scenario)


def test_token_ids_are_computed_as_they_stand_and_never_cached(
    play: Callable[..., None], faulty_engine: Any
) -> None:
    async def scenario(path: EmbeddingPath) -> None:
        for _ in range(2):
            answer = await path.embed_tokens([[3, 4, 5], [6]])
            assert answer.vectors.any(1).all() and not answer.cached.any()
            assert answer.tokens.tolist() == [3, 1]
        assert path.cache.rows == 0 and len(faulty_engine.embedded) == 4
        for bad in ([], [10**6], [-1], [1] * 1000):
            with pytest.raises(BadRow, match=r"input\[1\]"):
                await path.embed_tokens([[3], bad])
        faulty_engine.spoil = lambda vectors: vectors * 0
        with pytest.raises(BadRow, match="no usable vector"):
            await path.embed_tokens([[3]])

    play(scenario)


def test_a_full_queue_refuses_before_anything_is_tokenised_and_bulk_before_others(
    play: Callable[..., None], faulty_engine: Any
) -> None:
    async def scenario(path: EmbeddingPath) -> None:
        going = asyncio.Event()
        faulty_engine.before = going.wait
        bulk = asyncio.create_task(path.embed([f"a dog{' the' * n}" for n in range(10)], bulk=True))
        await until(lambda: path.queue.tokens >= 75)  # three quarters of the room
        with pytest.raises(QueueFull):
            await path.embed(["a red cat"], bulk=True)
        mine = asyncio.create_task(path.embed(["a cat"]))
        await until(lambda: path.queue.rows == 11)
        faulty_engine.before = None
        going.set()
        assert (await mine).vectors.any() and len((await bulk).vectors) == 10

    play(scenario, queue_tokens=100, batch_tokens=10)
