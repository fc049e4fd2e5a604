"""Text vectors: from the cache by key, what happens to captions it lacks, and the controls."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest

from lift_cache.bulk import write_cache
from lift_cache.encoding import Encoding
from lift_cache.errors import BadCaption, BadSource, MissingCaptions, RecipeMismatch
from lift_cache.recipe import Recipe
from lift_trainer.rejects import Rejects
from lift_trainer.samples import Index, build_index
from lift_trainer.text import HashedText, TokenText, open_texts
from lift_trainer.text_towers import Tokenizer
from tests.unit.trainer.conftest import Embedder, World, open_text, png, write_tar


@pytest.fixture
def index(world: World) -> Index:
    return build_index([str(world.shard)], Rejects(0))


@pytest.fixture
def larger(world: World) -> Index:
    """The world's samples and two more, with one caption that the cache lacks."""
    samples = [
        ("x0", png(0), {"captions": ["new caption 0", "drawing number 0"]}),
        ("x1", png(1), {"captions": ["drawing number 1"]}),
    ]
    extra = write_tar(world.root / "extra.tar", samples)
    return build_index([str(world.shard), str(extra)], Rejects(0))


def test_each_caption_gets_the_vector_that_was_stored_for_it(world: World, index: Index) -> None:
    text, _, origin = open_text(index, cache=str(world.cache), overlay=world.root / "o")
    order = np.random.default_rng(0).permutation(len(index.captions))
    expected = [world.vectors[world.captions.index(index.captions[i])] for i in order]
    assert text.gather(order) == pytest.approx(np.array(expected), abs=1e-3)
    assert origin.recipe == world.recipe and origin.snapshot
    again = pickle.loads(pickle.dumps(text))
    assert np.array_equal(again.gather(order), text.gather(order))


def test_a_cache_in_int8_trains_on_values_not_on_steps(world: World, index: Index) -> None:
    vectors = np.asarray(world.vectors, np.float32)
    encoding = Encoding.int8_of_range(vectors.min(0), vectors.max(0))
    write_cache(world.root / "int8", world.recipe, encoding, world.captions, vectors)
    text, _, _ = open_text(index, cache=str(world.root / "int8"), overlay=world.root / "o")
    expected = np.array([vectors[world.captions.index(caption)] for caption in index.captions])
    gathered = text.gather(np.arange(len(index.captions)))
    assert gathered.dtype == np.float32
    np.testing.assert_allclose(gathered, expected, atol=np.ptp(vectors, axis=0).max() / 254)
    assert 0 < text.resolution < 0.1


def test_the_cache_is_read_from_a_copy_without_its_live_tier(world: World, index: Index) -> None:
    copy = world.root / "copy"
    shutil.copytree(world.cache, copy, ignore=shutil.ignore_patterns("live", "*.lock", "lock"))
    assert not (copy / "live").exists()
    copy.chmod(0o555)
    text, _, _ = open_text(index, cache=str(copy), overlay=world.root / "o")
    original, _, _ = open_text(index, cache=str(world.cache), overlay=world.root / "o")
    everything = np.arange(len(index.captions))
    assert np.array_equal(text.gather(everything), original.gather(everything))


def test_missing_captions_are_an_error_that_counts_and_shows_them(world: World, larger: Index) -> None:
    with pytest.raises(
        MissingCaptions, match=r"1 of 36 captions \('new caption 0'\) are not in snapshot .* .lift-embed fill"
    ):
        open_text(larger, cache=str(world.cache), overlay=world.root / "o")


def test_missing_captions_can_be_skipped_without_touching_the_rest(
    world: World, larger: Index, capsys: pytest.CaptureFixture[str]
) -> None:
    text, kept, _ = open_text(larger, cache=str(world.cache), on_missing="skip", overlay=world.root / "o")
    assert "left out 1 of 36 captions ('new caption 0')" in capsys.readouterr().err
    assert len(kept) == 30 and kept.names[28:] == ["x0", "x1"]
    pair = kept.pairs[kept.first[28]]
    assert kept.captions[pair] == "drawing number 0"
    assert text.gather(np.array([pair]))[0] == pytest.approx(world.vectors[0], abs=1e-3)


def test_missing_captions_can_be_embedded_once_and_are_kept_beside_the_run(
    world: World, larger: Index, embedder: Embedder
) -> None:
    overlay = world.root / "run" / "overlay.safetensors"

    def open_it(url: str) -> tuple[np.ndarray, str | None]:
        text, index, origin = open_text(
            larger, cache=str(world.cache), on_missing="embed", server=url, overlay=overlay
        )
        return text.gather(np.arange(len(index.captions))), origin.overlay

    vectors, digest = open_it(embedder.url)
    new = larger.captions.index("new caption 0")
    assert embedder.embedded == ["new caption 0"]
    assert vectors[new].tolist() == [13.0] * 24
    assert vectors[0] == pytest.approx(world.vectors[0], abs=1e-3)
    # Again with no server at all: everything is at hand.
    again, same = open_it("http://127.0.0.1:9")
    assert np.array_equal(again, vectors) and same == digest


def test_a_missing_caption_without_a_vector_is_named(world: World, larger: Index, embedder: Embedder) -> None:
    embedder.refused.add("new caption 0")
    with pytest.raises(BadCaption, match=r"no vector for 'new caption 0' \(the vector is zero\)"):
        open_text(
            larger, cache=str(world.cache), on_missing="embed", server=embedder.url, overlay=world.root / "o"
        )
    assert not (world.root / "o").exists()


def test_kept_vectors_of_another_recipe_are_refused(
    world: World, larger: Index, embedder: Embedder, recipe: Recipe
) -> None:
    overlay = world.root / "overlay.safetensors"
    open_text(larger, cache=str(world.cache), on_missing="embed", server=embedder.url, overlay=overlay)
    other = recipe.model_copy(update={"pooling": "mean"})
    write_cache(world.root / "other", other, Encoding(dimensions=24), world.captions, world.vectors)
    with pytest.raises(BadSource, match=r"overlay\.safetensors holds vectors of recipe .* delete it"):
        open_text(
            larger,
            cache=str(world.root / "other"),
            on_missing="embed",
            server=embedder.url,
            overlay=overlay,
        )


def test_an_embedder_with_another_recipe_is_refused_by_field(
    world: World, larger: Index, recipe: Recipe
) -> None:
    other = Embedder(recipe.model_copy(update={"template": "query: {caption}"}))
    try:
        with pytest.raises(
            RecipeMismatch, match=r"template is '{caption}' in .* and 'query: {caption}' in http"
        ):
            open_text(
                larger, cache=str(world.cache), on_missing="embed", server=other.url, overlay=world.root / "o"
            )
    finally:
        other.close()
    assert not other.embedded and not (world.root / "o").exists()


def test_permuted_vectors_are_the_same_set_at_the_wrong_captions(world: World, index: Index) -> None:
    everything = np.arange(len(index.captions))
    true, _, _ = open_text(index, cache=str(world.cache), overlay=world.root / "o")

    def deal(seed: int) -> np.ndarray:
        text, _, _ = open_text(
            index, cache=str(world.cache), control="permuted", overlay=world.root / "o", seed=seed
        )
        return text.gather(everything)

    dealt = [deal(seed) for seed in (0, 0, 1)]
    assert np.array_equal(dealt[0], dealt[1]) and not np.array_equal(dealt[0], dealt[2])
    assert np.array_equal(np.unique(dealt[0], axis=0), np.unique(true.gather(everything), axis=0))
    assert (dealt[0] != true.gather(everything)).any(1).mean() > 0.8


@pytest.fixture
def shorter(world: World, recipe: Recipe) -> str:
    """A cache of another recipe, which lacks the world's first two captions."""
    other = recipe.model_copy(update={"pooling": "mean"})
    encoding = Encoding(dtype="float16", dimensions=24)
    write_cache(world.root / "shorter", other, encoding, world.captions[2:], -world.vectors[2:])
    return str(world.root / "shorter")


def test_of_several_caches_a_caption_that_any_lacks_is_left_out_of_all(
    world: World, larger: Index, shorter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = [str(world.cache), shorter]
    overlay = world.root / "o"
    with pytest.raises(MissingCaptions, match=r"1 of 36 captions \('new caption 0'\) are not in snapshot"):
        open_texts(larger, caches=caches, overlay=overlay)
    texts, index, origins = open_texts(larger, caches=caches, on_missing="skip", overlay=overlay)
    assert capsys.readouterr().err.startswith("left out 3 of 36 captions ('drawing number 0',")
    assert len(index.captions) == 33 and len(origins) == 2 and origins[0].recipe != origins[1].recipe
    everything = np.arange(33)
    rows = [world.captions.index(caption) for caption in index.captions]
    np.testing.assert_allclose(texts[0].gather(everything), world.vectors[rows], atol=1e-3)
    np.testing.assert_array_equal(texts[1].gather(everything), -texts[0].gather(everything))


def test_each_of_several_caches_keeps_what_was_embedded_for_it_apart(
    world: World, larger: Index, shorter: str, embedder: Embedder, recipe: Recipe
) -> None:
    overlay = world.root / "overlay.safetensors"
    other = Embedder(recipe.model_copy(update={"pooling": "mean"}))

    def open_both(url: str) -> list[np.ndarray]:
        texts, _, origins = open_texts(
            larger, caches=[str(world.cache), shorter], on_missing="embed", server=url, overlay=overlay
        )
        assert all(origin.overlay for origin in origins)
        return [text.gather(np.arange(len(larger.captions))) for text in texts]

    try:
        with pytest.raises(
            RecipeMismatch,
            match=r"pooling is 'mean' in .*shorter and 'last' in http.* fill other caches beforehand",
        ):
            open_both(embedder.url)  # an embedder has one recipe: it can fill one of the two
        open_text(larger, cache=shorter, on_missing="embed", server=other.url,
                  overlay=world.root / "overlay-1.safetensors")  # fmt: skip
    finally:
        other.close()
    first, second = open_both("http://127.0.0.1:9")
    new = larger.captions.index("new caption 0")
    assert (first[new] == 13).all() and (second[new] == 13).all()
    assert (second[0] == len("drawing number 0")).all() and first[0] == pytest.approx(
        world.vectors[0], abs=1e-3
    )


def test_tokens_are_those_of_each_caption_and_cut_ones_are_counted(index: Index) -> None:
    text = TokenText(index.captions, 5)
    order = np.random.default_rng(0).permutation(len(index.captions))
    everything = Tokenizer(5)([*index.captions])
    np.testing.assert_array_equal(text.gather(order), everything.ids[order])
    assert text.gather(order[:0]).shape == (0, 5)
    longer = int((everything.lengths > 5).sum())
    assert 0 < longer < 35 and text.truncated() == (longer, 35)
    assert text.truncated(most=7)[1] == 7 and TokenText(index.captions, 77).truncated() == (0, 35)


def test_hashed_ngrams_need_no_model_and_tell_word_order_apart() -> None:
    captions = [
        "a red circle left of a blue square",
        "a blue square left of a red circle",
        "A  red circle left of a blue square!",
    ]
    vectors = HashedText.of(captions).vectors
    assert vectors.shape == (3, 512)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3))
    assert vectors[0] @ vectors[1] < 0.95
    assert vectors[0] @ vectors[2] == pytest.approx(1.0)
    assert np.isfinite(HashedText.of(["!?", "🙂"]).vectors).all()


def test_hashed_words_know_nothing_of_order_and_need_no_cache(world: World, index: Index) -> None:
    twins = ["a red circle left of a blue square", "a blue square left of a red circle"]
    first, second = HashedText.of(twins, longest=1).vectors
    assert np.array_equal(first, second)
    other = HashedText.of(["a green circle left of a blue square"], longest=1).vectors[0]
    assert first @ other < 0.95
    (text,), _, (origin,) = open_texts(index, caches=[], control="word-hash", overlay=world.root / "o")
    assert np.array_equal(text.gather(np.arange(3)), HashedText.of([*index.captions][:3], longest=1).vectors)
    assert origin.control == "word-hash" and origin.snapshot is None
