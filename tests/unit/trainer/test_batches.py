"""What stands in a batch: one caption or all, several caches, texts beyond the batch, and whose they are."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lift_cache.bulk import write_cache
from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig, BadSource
from lift_cache.recipe import Recipe
from lift_trainer.batches import Batch, Batches
from lift_trainer.images import BadImage, ImageStore
from lift_trainer.losses import Extra, InfoNCE
from lift_trainer.rejects import Rejects
from lift_trainer.samples import Index, build_index
from lift_trainer.sampling import (
    Captions,
    Sampler,
    choose_mixed,
    choose_several,
    draw_texts,
    mix_weights,
)
from lift_trainer.text import TextVectors, TokenText, open_texts
from tests.unit.trainer.conftest import World, png, write_tar

CPU = torch.device("cpu")


@pytest.fixture
def index(world: World) -> Index:
    """28 samples of two captions, of which every fourth has four."""
    samples = []
    for i in range(28):
        more = [f"also called {i}", f"also called {i}"] * (i % 4 == 0)
        samples.append(
            (f"{i:04d}", png(i), {"captions": [f"drawing number {i}", f"drawing number {i % 7}", *more]})
        )
    return build_index([str(write_tar(world.root / "several.tar", samples))], Rejects(0))


@pytest.fixture
def texts(world: World, index: Index) -> tuple[TextVectors, ...]:
    return open_texts(index, caches=[str(world.cache)], overlay=world.root / "o")[0]


def batches(index: Index, texts: tuple[TextVectors, ...], size: int = 8, **more: Any) -> Batches:
    return Batches(ImageStore(index, 10**6), texts, Sampler(0, len(index), size), 0, 16, 0, **more)


def stream(made: Batches, workers: int = 0) -> list[Batch]:
    return list(made.stream(1, 7, workers, CPU))


def captions_of(index: Index, sample: int) -> list[int]:
    return index.pairs[index.first[sample] : index.first[sample + 1]].tolist()


def test_a_batch_says_of_which_image_and_which_caption_each_vector_is(
    index: Index, texts: tuple[TextVectors, ...]
) -> None:
    for step, batch in enumerate(stream(batches(index, texts)), 1):
        assert batch.images.tolist() == Sampler(0, 28, 8).batch(step).tolist()
        for image, caption, vector in zip(batch.images.tolist(), batch.captions, batch.texts[0], strict=True):
            assert int(caption) in captions_of(index, image)
            assert np.array_equal(vector.numpy(), texts[0].gather(caption[None].numpy())[0])
        assert batch.known.shape == (8, 0) and batch.extra_texts[0].shape == (0, 24)


def test_all_captions_of_an_image_stand_beside_it_and_absent_ones_are_zeros(
    index: Index, texts: tuple[TextVectors, ...]
) -> None:
    for batch in stream(batches(index, texts, captions=Captions("all"))):
        assert batch.captions.shape == (8, 4) and batch.texts[0].shape == (8, 4, 24)
        for image, captions, vectors in zip(
            batch.images.tolist(), batch.captions, batch.texts[0], strict=True
        ):
            own = captions_of(index, image)
            assert captions.tolist() == own + [-1] * (4 - len(own))
            assert np.array_equal(vectors[: len(own)].numpy(), texts[0].gather(np.array(own)))
            assert not vectors[len(own) :].any()


def test_of_more_captions_than_are_wanted_each_comes_equally_often(index: Index) -> None:
    samples, counts = np.arange(20_000), np.tile([2, 3, 5], 20_000)[:20_000]
    chosen = choose_several(0, 0, samples, counts, 3)
    assert (chosen[counts == 2] == [0, 1, -1]).all() and (chosen[counts == 3] == [0, 1, 2]).all()
    drawn = chosen[counts == 5]
    assert (np.diff(drawn) > 0).all(), "none twice, in their order"
    assert np.bincount(drawn.ravel()) == pytest.approx([len(drawn) * 3 / 5] * 5, rel=0.03)
    assert not np.array_equal(chosen, choose_several(0, 1, samples, counts, 3))
    assert Captions("all", most=3).width(index.most_captions) == 3


@given(st.lists(st.integers(1, 7), min_size=1, max_size=20), st.integers(1, 9), st.integers(0, 99))
def test_which_captions_are_drawn_depends_on_nothing_but_the_image(
    counts: list[int], width: int, epoch: int
) -> None:
    samples, number = np.arange(len(counts)), np.array(counts)
    together = choose_several(3, epoch, samples, number, width)
    one_by_one = [choose_several(3, epoch, samples[i : i + 1], number[i : i + 1], width)[0] for i in samples]
    np.testing.assert_array_equal(together, one_by_one)
    for row, count in zip(together, counts, strict=True):
        kept = row[row >= 0]
        assert len(set(kept.tolist())) == len(kept) == min(count, width) and (kept < count).all()


def test_several_caches_give_each_caption_its_vector_from_each(
    world: World, index: Index, recipe: Recipe, vectors: Callable[..., np.ndarray]
) -> None:
    other = vectors(len(world.captions), seed=5, dimensions=12)
    made_by = recipe.model_copy(update={"dimensions": 12, "pooling": "mean"})
    write_cache(
        world.root / "other", made_by, Encoding(dtype="float32", dimensions=12), world.captions, other
    )
    caches = [str(world.cache), str(world.root / "other")]
    texts, _, origins = open_texts(index, caches=caches, overlay=world.root / "o")
    assert [origin.recipe for origin in origins] == [recipe, made_by]
    for batch in stream(batches(index, texts, captions=Captions("all"), negatives=4)):
        assert [text.shape for text in batch.texts] == [(8, 4, 24), (8, 4, 12)]
        assert [text.shape for text in batch.extra_texts] == [(4, 24), (4, 12)]
        captions = [index.captions[int(caption)] for caption in batch.captions[batch.captions >= 0]]
        rows = [world.captions.index(caption) for caption in captions]
        for text, stored in zip(batch.texts, (world.vectors, other), strict=True):
            np.testing.assert_allclose(text[batch.captions >= 0], stored[rows], atol=1e-3)


def test_texts_beyond_the_batch_are_training_captions_a_function_of_the_step(
    index: Index, texts: tuple[TextVectors, ...]
) -> None:
    made = stream(batches(index, texts, negatives=64))
    for step, batch in enumerate(made, 1):
        expected = draw_texts(0, step, np.arange(64), len(index.captions))
        assert batch.extra_captions.tolist() == expected.tolist()
        assert np.array_equal(batch.extra_texts[0].numpy(), texts[0].gather(expected))
        for image, known in zip(batch.images.tolist(), batch.known.tolist(), strict=True):
            own = captions_of(index, image)
            assert known[: len(own)] == own and set(known[len(own) :]) <= {-1}
    assert not torch.equal(made[0].extra_captions, made[1].extra_captions)
    drawn = draw_texts(0, 0, np.arange(30_000), 3)
    assert np.bincount(drawn) == pytest.approx([10_000] * 3, rel=0.05)
    with_none = stream(batches(index, texts))
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(made, with_none, strict=True))
    assert all(torch.equal(a.captions, b.captions) for a, b in zip(made, with_none, strict=True))


CASES = [
    {"captions": Captions("all", 3), "negatives": 12},
    {"negatives": 4},
    {"captions": Captions("all", 9)},
]


@pytest.mark.parametrize("case", CASES)
def test_parts_workers_and_ranks_join_to_the_same_batch(
    index: Index, texts: tuple[TextVectors, ...], case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stream(batches(index, texts, **case))
    monkeypatch.setattr("lift_trainer.batches.PART", 3)
    parted = stream(batches(index, texts, **case), workers=1)
    sampler = Sampler(0, 28, 8)
    ranks = {
        count: [
            stream(batches(index, texts, share=sampler.share(rank, count), **case)) for rank in range(count)
        ]
        for count in (2, 4)
    }
    for number, whole in enumerate(expected):
        for other in (
            parted[number],
            *(Batch.join([one[number] for one in ranks[count]]) for count in ranks),
        ):
            most = whole.known.shape[1]
            assert torch.equal(other.known[:, :most], whole.known) and (other.known[:, most:] == -1).all()
            for field in ("pixels", "captions", "images", "extra_captions"):
                assert torch.equal(getattr(other, field), getattr(whole, field)), field
            for field in ("texts", "extra_texts"):
                for a, b in zip(getattr(other, field), getattr(whole, field), strict=True):
                    assert torch.equal(a, b), field


def test_further_texts_are_shared_out_equally_or_refused(
    index: Index, texts: tuple[TextVectors, ...]
) -> None:
    share = Sampler(0, 28, 8).share(1, 4)
    with pytest.raises(BadConfig, match=r"--text-negatives is 6 for all processes together and there are 4"):
        batches(index, texts, share=share, negatives=6)


def test_a_batch_is_what_the_loss_takes(index: Index, texts: tuple[TextVectors, ...]) -> None:
    case = {"captions": Captions("all"), "negatives": 16}
    for batch in stream(batches(index, texts, **case)):
        x_bd = torch.nn.functional.normalize(batch.pixels.float().flatten(1)[:, :24], dim=1)
        y_bpd, y_md = batch.texts[0].float(), batch.extra_texts[0].float()
        extra = Extra(y_md, batch.extra_captions, batch.known)
        value = InfoNCE("caption+image")(x_bd, y_bpd, batch.captions, batch.images, extra)
        assert value.loss.isfinite() and 0 < value.masked < 1


def test_an_image_that_stands_in_for_a_broken_one_brings_its_own_number_and_captions(
    world: World, index: Index
) -> None:
    texts = open_texts(index, caches=[str(world.cache)], overlay=world.root / "o")[0]
    made = batches(index, texts, captions=Captions("all"), negatives=2)
    object.__setattr__(made, "max_bad", 1)
    read = made.images.pixels

    class Store(ImageStore):
        def pixels(self, sample: int) -> torch.Tensor:
            if sample == 3:
                raise BadImage("broken")
            return read(sample)

    object.__setattr__(made, "images", Store(index, 10**6))
    step = next(step for step in range(3) if 3 in Sampler(0, 28, 8).batch(step))
    batch = next(made.stream(step, step + 1, 0, CPU))
    place = Sampler(0, 28, 8).batch(step).tolist().index(3)
    assert batch.images[place] == 4 and batch.bad == [(3, "broken")]
    assert batch.captions[place].tolist() == batch.known[place].tolist() == captions_of(index, 4)


def test_tokens_are_made_in_the_workers_and_absent_captions_are_zeros(index: Index) -> None:
    text = TokenText(index.captions, 9)
    pickled = len(pickle.dumps(text))
    assert text.dimensions == 9 and pickled < 20_000
    made = stream(batches(index, (text,), captions=Captions("all"), negatives=4))
    again = stream(
        batches(index, (pickle.loads(pickle.dumps(text)),), captions=Captions("all"), negatives=4), 1
    )
    for batch, same in zip(made, again, strict=True):
        assert batch.texts[0].shape == (8, 4, 9) and batch.texts[0].dtype == torch.int64
        assert torch.equal(batch.texts[0], same.texts[0])
        assert torch.equal(batch.extra_texts[0], torch.from_numpy(text.gather(batch.extra_captions.numpy())))
        assert (
            not batch.texts[0][batch.captions < 0].any() and batch.texts[0][batch.captions >= 0].any(1).all()
        )


# ---------------------------------------------------------------------------------------------- caption fields


@pytest.fixture
def fields(world: World) -> Index:
    """Short and long captions; every third sample has no long one, sample 1 no short one."""
    samples = []
    for i in range(28):
        record: dict[str, object] = {"short": f"drawing number {i}"} if i != 1 else {"short": None}
        if i % 3 or i == 1:
            record["long"] = [f"drawing number {(i + k) % 28}" for k in range(1, 4)]
        samples.append((f"{i:04d}", png(i), record))
    shard = write_tar(world.root / "fields.tar", samples)
    return build_index([str(shard)], Rejects(0), caption_fields=("short", "long"))


def test_a_mix_draws_the_field_first_and_then_a_caption_of_it() -> None:
    # Short; short and three long ones; three long ones; one of a field that never comes.
    table = np.array([[0, -1, -1, -1], [0, 1, 1, 1], [1, 1, 1, -1], [2, -1, -1, -1]])
    weights = mix_weights((0.2, 0.6, 0.0), table)
    assert weights[0].tolist() == [0.2, 0, 0, 0] and weights[3].tolist() == [1, 0, 0, 0]
    assert weights[1] == pytest.approx([0.2, 0.2, 0.2, 0.2])
    samples = np.arange(20_000)
    chosen = choose_mixed(0, 0, samples, mix_weights((0.7, 0.3), table[1:2].repeat(20_000, 0)))
    assert np.bincount(chosen) / 20_000 == pytest.approx([0.7, 0.1, 0.1, 0.1], abs=0.015)
    assert not np.array_equal(chosen, choose_mixed(0, 1, samples, weights[1:2].repeat(20_000, 0)))


def test_batches_mix_fields_as_often_as_they_are_told(world: World, fields: Index) -> None:
    texts = open_texts(fields, caches=[str(world.cache)], overlay=world.root / "o")[0]

    def long_share(mix: tuple[float, ...]) -> float:
        long, both = 0, 0
        for batch in batches(fields, texts, captions=Captions(mix=mix)).stream(0, 120, 0, CPU):
            for image, caption in zip(batch.images.tolist(), batch.captions.tolist(), strict=True):
                here = slice(*fields.first[image : image + 2].tolist())
                which = fields.field_of_pair[here][fields.pairs[here] == caption]
                if image == 1:
                    assert which.tolist() == [1]
                elif image % 3 == 0:
                    assert which.tolist() == [0]
                else:
                    both, long = both + 1, long + int(which[0] == 1)
        return long / both

    assert long_share((0.0, 1.0)) == 1.0 and long_share((1.0, 0.0)) == 0.0
    assert long_share((0.5, 0.5)) == pytest.approx(0.5, abs=0.06)
    assert long_share((4, 1)) == pytest.approx(0.2, abs=0.06)


@pytest.mark.parametrize("mix", [(0.0, 0.0), (-1.0, 2.0), (float("nan"), 1.0)])
def test_a_mix_that_is_none_is_one_clear_line(mix: tuple[float, ...]) -> None:
    with pytest.raises(BadConfig, match="give a share from 0 for each field"):
        Captions(mix=mix)
    with pytest.raises(BadConfig, match="draws one caption"):
        Captions("all", mix=(0.5, 0.5))
    with pytest.raises(BadConfig, match="at least 1"):
        Captions("all", most=0)


def test_a_field_that_no_sample_has_is_named(world: World, fields: Index) -> None:
    shard = str(world.root / "fields.tar")
    with pytest.raises(
        BadSource, match=r"--caption-field lnog: no sample of .*fields\.tar has a caption in it"
    ):
        build_index([shard], Rejects(1), caption_fields=("short", "lnog"))
    with pytest.raises(BadConfig, match="name each field once"):
        build_index([shard], Rejects(0), caption_fields=("short", "short"))
    samples = [("0", png(0), {"short": " ", "long": []}), ("1", png(1), {"short": "a", "long": "b"})]
    rejects = Rejects(1)
    index = build_index(
        [str(write_tar(world.root / "x.tar", samples))], rejects, caption_fields=("short", "long")
    )
    assert index.names == ["1"] and len(rejects.named) == 1
