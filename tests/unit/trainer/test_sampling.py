"""Order, captions and crops are functions of (seed, epoch, step), whatever the workers."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from lift_cache.errors import BadConfig
from lift_trainer.batches import Batch, Batches
from lift_trainer.images import ImageStore
from lift_trainer.job import prepare
from lift_trainer.sampling import FULL, Sampler, Shuffle, choose_caption, crop_boxes, epoch_order, uniform
from tests.unit.trainer.conftest import World


def test_an_epoch_shows_every_sample_once_and_epochs_differ() -> None:
    orders = [epoch_order(0, epoch, 1000) for epoch in range(3)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], epoch_order(1, 0, 1000))


def test_the_order_is_fixed_for_all_versions() -> None:
    assert epoch_order(7, 3, 8).tolist() == [0, 3, 7, 1, 6, 4, 2, 5]


def test_a_batch_depends_on_its_step_alone() -> None:
    sampler = Sampler(seed=3, samples=100, batch_size=32)
    assert sampler.steps_per_epoch == 3
    later = sampler.batch(7).tolist()
    assert Sampler(3, 100, 32).batch(7).tolist() == later
    epoch = np.concatenate([sampler.batch(step) for step in (3, 4, 5)])
    assert len(set(epoch.tolist())) == 96


def test_batches_are_the_same_with_any_workers_parts_and_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(world.config())

    def stream(workers: int = 0, preload: bool = False) -> list[Batch]:
        store = ImageStore(job.index, 10**6)
        assert store.preload(1 << 20) if preload else not store.in_memory
        made = Batches(store, job.texts, job.sampler, seed=0, image_size=16, max_bad=0)
        return list(made.stream(1, 6, workers, torch.device("cpu")))

    expected = stream()
    assert len(expected) == 5
    others = [stream(workers=2), stream(preload=True)]
    monkeypatch.setattr("lift_trainer.batches.PART", 3)
    others.append(stream(workers=1))
    for other in others:
        for a, b in zip(expected, other, strict=True):
            assert torch.equal(a.pixels, b.pixels)
            assert torch.equal(a.captions, b.captions)
            assert torch.equal(a.texts[0], b.texts[0])


SHUFFLES = [Shuffle(7, 13), Shuffle(16, 4), Shuffle(1, 3), Shuffle(64, 1), FULL]


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("n", [3, 64, 65, 1000])
def test_every_shuffle_shows_every_sample_once(shuffle: Shuffle, n: int) -> None:
    orders = [epoch_order(0, epoch, n, shuffle) for epoch in range(2)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n == 3 or not np.array_equal(*orders)


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_batches_and_their_parts_are_pieces_of_the_epochs_order(shuffle: Shuffle) -> None:
    sampler = Sampler(5, 1000, 48, shuffle)
    for epoch in range(2):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        joined = np.concatenate([sampler.batch(step) for step in steps])
        np.testing.assert_array_equal(joined, epoch_order(5, epoch, 1000, shuffle)[: len(joined)])
    parts = [sampler.batch(3, slice(start, start + 10)) for start in range(0, 48, 10)]
    np.testing.assert_array_equal(np.concatenate(parts), sampler.batch(3))


def test_small_data_are_shuffled_in_full_whatever_the_blocks() -> None:
    full = epoch_order(1, 2, 500, FULL)
    np.testing.assert_array_equal(epoch_order(1, 2, 500), full)
    np.testing.assert_array_equal(epoch_order(1, 2, 500, Shuffle(50, 10)), full)
    assert not np.array_equal(epoch_order(1, 2, 500, Shuffle(50, 9)), full)


def test_the_order_of_blocks_is_fixed_for_all_versions() -> None:
    assert epoch_order(7, 3, 11, Shuffle(2, 2)).tolist() == [0, 6, 7, 1, 8, 3, 2, 9, 4, 5, 10]


def test_a_buffer_holds_whole_blocks_and_reading_ahead_comes_before_use() -> None:
    shuffle, n = Shuffle(8, 16), 5003
    order = epoch_order(0, 0, n, shuffle)
    used = np.empty(n, np.int64)
    used[order] = np.arange(n)
    spread = [np.ptp(used[start : start + 8]) for start in range(0, n - 8, 8)]
    assert max(spread) <= 2 * shuffle.window, "a block is used within its buffer"
    sampler = Sampler(0, n, 50, shuffle)
    read: dict[int, int] = {}
    for step in range(sampler.steps_per_epoch):
        for run in sampler.ahead(step):
            assert len(run) <= 8
            for sample in run:
                assert sample not in read, "read once"
                read[sample] = step
    late = [sample for sample, step in read.items() if used[sample] < step * 50]
    assert not late and len(read) > n - shuffle.window - 60


@pytest.mark.parametrize("shuffle", [Shuffle(16, 256), Shuffle(64, 16), FULL])
def test_a_batch_of_blocks_is_as_mixed_as_blocks_and_buffer_say(shuffle: Shuffle) -> None:
    """Other samples of a batch from a sample's own shard, against a full permutation: what bench/order.py measures."""
    n, size, shard = 40_960, 512, 512
    sampler = Sampler(0, n, size, shuffle)
    counts = np.stack(
        [np.bincount(sampler.batch(s) // shard, minlength=n // shard) for s in range(sampler.steps_per_epoch)]
    )
    partners = (counts * (counts - 1)).sum() / counts.sum()
    of_the_shard = shard - 1
    if shuffle != FULL:  # its own block for certain, the others as often as they share the buffer
        blocks = n // shuffle.block
        share = min((n / round(blocks / shuffle.buffer) / shuffle.block - 1) / (blocks - 1), 1)
        of_the_shard = shuffle.block - 1 + (shard - shuffle.block) * share
        n = n // round(blocks / shuffle.buffer)
    assert partners == pytest.approx(of_the_shard * (size - 1) / (n - 1), rel=0.05)


@pytest.mark.parametrize("shuffle", [FULL, Shuffle(16, 8)])
def test_one_two_and_four_ranks_see_the_same_global_batches(shuffle: Shuffle) -> None:
    sampler = Sampler(2, 1000, 64, shuffle)
    for step in (0, 7, 20):
        for ranks in (1, 2, 4):
            shares = [sampler.batch(step, sampler.share(rank, ranks)) for rank in range(ranks)]
            assert {len(share) for share in shares} == {64 // ranks}
            np.testing.assert_array_equal(np.concatenate(shares), sampler.batch(step))
    with pytest.raises(BadConfig, match="--batch-size is 64 for all processes together and there are 3"):
        sampler.share(0, 3)


def test_the_images_crops_and_captions_of_all_ranks_are_those_of_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(world.config())
    monkeypatch.setattr("lift_trainer.batches.PART", 3)

    def stream(share: slice | None) -> list[Batch]:
        made = Batches(ImageStore(job.index, 10**6), job.texts, job.sampler, 0, 16, 0, share)
        return list(made.stream(2, 6, 0, torch.device("cpu")))

    whole = stream(None)
    for ranks in (2, 4):
        shares = [stream(job.sampler.share(rank, ranks)) for rank in range(ranks)]
        for expected, *parts in zip(whole, *shares, strict=True):
            joined = Batch.join(parts)
            assert torch.equal(joined.pixels, expected.pixels)
            assert torch.equal(joined.captions, expected.captions)
            assert torch.equal(joined.texts[0], expected.texts[0])


def test_reading_ahead_changes_nothing_and_reads_whole_blocks(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(world.config())
    sampler = Sampler(0, len(job.index), 4, Shuffle(4, 2))

    def pixels() -> list[torch.Tensor]:
        batches = Batches(ImageStore(job.index, 10**6), job.texts, sampler, 0, 16, 0)
        return [batch.pixels for batch in batches.stream(0, 7, 0, torch.device("cpu"))]

    read: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "lift_trainer.shards.LocalShard.read_ahead", lambda self, offset, size: read.append((offset, size))
    )
    monkeypatch.setattr("lift_trainer.read_ahead._room", lambda *, remote: 1e12)
    ahead = pixels()
    for _ in range(100):
        if len(read) == 5:
            break
        time.sleep(0.02)
    assert len(read) == 5, "the 28 samples are 7 blocks, of which the first window of 2 has nothing before it"
    assert all(size > 3 * 512 for _, size in read)
    monkeypatch.setattr("lift_trainer.read_ahead._room", lambda *, remote: 0)
    assert all(torch.equal(a, b) for a, b in zip(ahead, pixels(), strict=True))


def test_all_captions_of_an_image_are_used_equally_often() -> None:
    samples = np.arange(30_000)
    chosen = choose_caption(0, 0, samples, np.full(len(samples), 3))
    assert np.bincount(chosen) == pytest.approx([10_000] * 3, rel=0.05)
    assert not np.array_equal(chosen, choose_caption(0, 1, samples, np.full(len(samples), 3)))


def test_crops_stay_inside_and_keep_nine_tenths_of_the_area() -> None:
    n = 5000
    sizes = np.stack([np.full(n, 60), np.full(n, 80)], 1)
    top, left, height, width = crop_boxes(0, 0, np.arange(n), sizes).T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 60).all() and (left + width <= 80).all()
    area = height * width / 4800
    assert area.min() > 0.88 and area.max() <= 1.0
    assert 0.9 < area.mean() < 0.97
    # An image far from any allowed aspect ratio gets the largest central box.
    assert crop_boxes(0, 0, np.arange(1), np.array([[10, 100]])).tolist() == [[0, 43, 10, 13]]


def test_the_hash_is_uniform_and_its_streams_are_independent() -> None:
    a, b = uniform(0, 1, np.arange(20_000)), uniform(0, 2, np.arange(20_000))
    assert a.mean() == pytest.approx(0.5, abs=0.01) and a.var() == pytest.approx(1 / 12, rel=0.03)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03


def test_a_batch_larger_than_the_data_is_one_clear_line() -> None:
    with pytest.raises(
        BadConfig, match=r"--batch-size is 64 and the data hold 28 images; use --batch-size 28"
    ):
        Sampler(0, 28, 64)
