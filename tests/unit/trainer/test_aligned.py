"""Training from aligned files: the same vectors as from the cache, and nothing that belongs to other images."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from lift_cache.bulk import write_cache
from lift_cache.encoding import Encoding
from lift_cache.errors import (
    BadConfig,
    BadSource,
    CacheDamaged,
    EncodingMismatch,
    MissingCaptions,
    RecipeMismatch,
)
from lift_cache.tools import aligned as tool
from lift_cache.tools.export import export_aligned
from lift_trainer import aligned
from lift_trainer.aligned import AlignedText, open_aligned
from lift_trainer.batches import Batches
from lift_trainer.config import TransformSpec
from lift_trainer.images import ImageStore
from lift_trainer.job import prepare
from lift_trainer.loop import train
from lift_trainer.rejects import Rejects
from lift_trainer.samples import Index, build_index
from lift_trainer.sampling import Captions, Sampler
from lift_trainer.transform import fit_transform
from tests.unit.trainer.conftest import World, open_text, png, write_tar


@pytest.fixture
def shards(world: World) -> list[Path]:
    """Two shards of the world's captions; the second repeats captions of the first, and of itself."""
    other = [
        (
            f"b/{i}",
            png(i),
            {"captions": [f"drawing number {27 - i}", f"also called {i - i % 4}", f"drawing number {i}"]},
        )
        for i in range(9)
    ]
    return [world.shard, write_tar(world.root / "train-001.tar", other)]


@pytest.fixture
def index(shards: list[Path]) -> Index:
    return build_index([str(shard) for shard in shards], Rejects(0))


@pytest.fixture(params=["float16", "float32", "int8"])
def cache(request: pytest.FixtureRequest, world: World) -> str:
    made = np.asarray(world.vectors, np.float32)
    encoding = (
        Encoding.int8_of_range(made.min(0), made.max(0))
        if request.param == "int8"
        else Encoding(dtype=request.param, dimensions=24)
    )
    write_cache(world.root / request.param, world.recipe, encoding, world.captions, made)
    return str(world.root / request.param)


def export(world: World, shards: list[Path], cache: str | None = None, **more: object) -> Path:
    out = world.root / "aligned"
    export_aligned(cache or str(world.cache), [str(shard) for shard in shards], out, **more)  # type: ignore[arg-type]
    return out


def test_aligned_files_give_every_caption_and_every_pair_the_vector_of_the_cache(
    world: World, shards: list[Path], index: Index, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "BATCH_BYTES", 1000)  # many record batches in each file
    directory = export(world, shards, cache)
    text, same, origin = open_aligned(index, directory, recipe=world.recipe)
    stored, _, expected = open_text(index, cache=cache, overlay=world.root / "o")
    assert same is index and origin == expected
    assert (text.dimensions, text.resolution) == (stored.dimensions, stored.resolution)
    captions = np.random.default_rng(0).permutation(len(index.captions))
    pairs = np.random.default_rng(1).permutation(len(index.pairs))
    for one in (text, pickle.loads(pickle.dumps(text))):
        assert one.gather(captions).dtype == stored.gather(captions).dtype
        np.testing.assert_array_equal(one.gather(captions), stored.gather(captions))
        np.testing.assert_array_equal(one.gather_pairs(pairs), stored.gather(index.pairs[pairs]))
    assert one.gather(captions[:0]).shape == (0, 24)
    transforms = [fit_transform(TransformSpec.parse("whiten:2"), t, index.keys) for t in (text, stored)]
    projections = [transform.projection_dk for transform in transforms]
    assert projections[0] is not None and projections[1] is not None
    assert torch.equal(projections[0], projections[1])


@pytest.mark.parametrize("captions", [Captions(), Captions("all")])
def test_batches_from_aligned_files_are_those_from_the_cache(
    world: World, shards: list[Path], index: Index, captions: Captions
) -> None:
    sources = [
        open_aligned(index, export(world, shards))[0],
        open_text(index, cache=str(world.cache), overlay=world.root / "o")[0],
    ]
    streams = [
        Batches(
            ImageStore(index, 10**6), (text,), Sampler(0, 37, 8), 0, 16, 0, captions=captions, negatives=8
        ).stream(0, 6, 0, torch.device("cpu"))
        for text in sources
    ]
    for a, b in zip(*streams, strict=True):
        assert torch.equal(a.texts[0], b.texts[0]) and torch.equal(a.captions, b.captions)
        assert torch.equal(a.extra_texts[0], b.extra_texts[0])


@pytest.mark.slow
def test_a_run_on_aligned_files_is_the_run_on_their_cache_to_the_bit_and_goes_on(
    world: World, shards: list[Path]
) -> None:
    data = {
        "data": [str(shard) for shard in shards],
        "steps": 6,
        "checkpoint_every": 3,
        "text_transform": "center",
    }
    aligned = {"text": "aligned", "cache": str(export(world, shards))}
    whole = train(prepare(world.config("cache", **data)))
    cut = train(prepare(world.config("aligned", **data, **aligned)))
    (cut.checkpoint / "state.json").unlink()
    parts = train(prepare(world.config("aligned", **data, **aligned)))
    expected, found = (load_file(one.checkpoint / "model.safetensors") for one in (whole, parts))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    write_cache(
        world.root / "other", world.recipe, Encoding(dimensions=24), world.captions, world.vectors + 0.1
    )
    export_aligned(str(world.root / "other"), data["data"], world.root / "other-aligned")
    with pytest.raises(BadConfig, match=r"begun with the snapshot of --cache = .* and is now given"):
        prepare(world.config("aligned", **data, **aligned | {"cache": str(world.root / "other-aligned")}))


def test_the_vector_beside_the_image_is_the_one_that_is_read(
    world: World, shards: list[Path], index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, _, _ = open_aligned(index, export(world, shards))
    read: list[int] = []
    gather_from = AlignedText._gather_from

    def watched(self: AlignedText, file: int, *rest: object) -> None:
        read.append(file)
        gather_from(self, file, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(AlignedText, "_gather_from", watched)
    text.gather_pairs(np.arange(index.first[28], len(index.pairs)))
    assert read == [1], "captions that the first shard has too come from the images' own"


def test_null_vectors_are_an_error_or_left_out(
    world: World, shards: list[Path], index: Index, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, encoding = world.root / "fewer", Encoding(dtype="float16", dimensions=24)
    write_cache(cache, world.recipe, encoding, world.captions[3:], world.vectors[3:])
    directory = export(world, shards, str(cache), on_missing="null")
    with pytest.raises(
        MissingCaptions,
        match=r"3 of 35 captions \('drawing number 0', .* have no vector in .* --on-missing skip",
    ):
        open_aligned(index, directory)
    text, kept, _ = open_aligned(index, directory, on_missing="skip")
    assert "left out 3 of 35 captions" in capsys.readouterr().err
    assert len(kept.captions) == 32 and len(kept) == 28 - 2 + 9  # sample 0 has another one
    stored, expected, _ = open_text(index, cache=str(cache), on_missing="skip", overlay=world.root / "o")
    assert kept.digest == expected.digest
    everything = np.arange(32)
    np.testing.assert_array_equal(text.gather(everything), stored.gather(everything))
    pairs = np.arange(len(kept.pairs))
    np.testing.assert_array_equal(text.gather_pairs(pairs), stored.gather(kept.pairs))


def test_files_of_other_shards_or_other_samples_are_refused_by_name(
    world: World, shards: list[Path], index: Index
) -> None:
    directory = export(world, shards[:1])
    with pytest.raises(
        BadSource, match=r"train-001\.arrow: no such file; make it with lift-cache export aligned"
    ):
        open_aligned(index, directory)
    second = directory / "train-001.arrow"
    second.write_bytes((directory / "train-000.arrow").read_bytes())
    with pytest.raises(
        BadSource, match=r"train-001\.arrow was exported for train-000\.tar, not for .*001\.tar"
    ):
        open_aligned(index, directory)
    second.write_bytes(b"something")
    with pytest.raises(BadSource, match="is not an aligned export"):
        open_aligned(index, directory)
    samples = [(f"b/{i}", png(i), {"captions": [f"drawing number {27 - i}"]}) for i in range(9)]
    fewer = write_tar(world.root / "elsewhere.tar", samples).rename(shards[1])
    second.unlink()
    export(world, [fewer])
    with pytest.raises(
        BadSource, match=r"has 9 samples and 9 captions, and .*001\.tar 9 and 27; .*--caption-field"
    ):
        open_aligned(index, directory)
    later = build_index([str(fewer)], Rejects(0))
    write_tar(
        fewer, [(key, png(i), {"captions": ["drawing number 5"]}) for i, (key, *_) in enumerate(samples)]
    )
    changed = build_index([str(fewer)], Rejects(0))
    open_aligned(later, directory)
    with pytest.raises(BadSource, match="was exported for other samples or captions"):
        open_aligned(changed, directory)


def test_files_of_other_vectors_are_refused_by_field(
    world: World, shards: list[Path], index: Index, vectors: Callable[..., np.ndarray]
) -> None:
    directory = export(world, shards)
    mean = world.recipe.model_copy(update={"pooling": "mean"})
    with pytest.raises(RecipeMismatch, match="pooling"):
        open_aligned(index, directory, recipe=mean)

    def second_from(name: str, recipe: object, encoding: Encoding) -> None:
        made = vectors(len(world.captions), seed=1)
        write_cache(world.root / name, recipe, encoding, world.captions, made)  # type: ignore[arg-type]
        export(world, shards[1:], str(world.root / name))

    second_from("mean", mean, Encoding(dtype="float16", dimensions=24))
    with pytest.raises(
        RecipeMismatch, match=r"pooling is .* in .*train-000\.arrow and .* in .*train-001\.arrow"
    ):
        open_aligned(index, directory)
    second_from("float32", world.recipe, Encoding(dtype="float32", dimensions=24))
    with pytest.raises(EncodingMismatch, match=r"train-001\.arrow"):
        open_aligned(index, directory)
    second_from("again", world.recipe, Encoding(dtype="float16", dimensions=24))
    with pytest.raises(
        BadSource, match=r"is from snapshot .* and .*train-001\.arrow from .*; export all shards"
    ):
        open_aligned(index, directory)


def test_a_table_and_a_file_of_another_length_are_refused(world: World, shards: list[Path]) -> None:
    (world.root / "0.png").write_bytes(png(0))
    (world.root / "t.csv").write_text("image,caption\n0.png,drawing number 0\n")
    with pytest.raises(BadSource, match=r"t\.csv: only tars have aligned exports"):
        open_aligned(build_index([str(world.root / "t.csv")], Rejects(0)), world.root)
    directory = export(world, shards[:1])
    path = directory / "train-000.arrow"
    with pa.ipc.open_file(pa.BufferReader(path.read_bytes())) as reader:
        schema, batch = reader.schema, reader.get_batch(0)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch.slice(0, 20))
    index = build_index([str(world.shard)], Rejects(0))
    with pytest.raises(BadSource, match=r"train-000\.arrow has 25 rows and says 35"):
        open_aligned(index, directory)
    with pytest.raises(BadSource, match="cannot be read"):
        path.unlink()
        path.mkdir()
        open_aligned(index, directory)


def test_a_file_that_was_exchanged_meanwhile_is_noticed(
    world: World, shards: list[Path], index: Index
) -> None:
    text, _, _ = open_aligned(index, export(world, shards))
    everything = np.arange(len(index.pairs))
    text.gather_pairs(everything)
    other = [(f"{i:04d}", png(i), {"captions": [f"drawing number {27 - i}"]}) for i in range(28)]
    (world.root / "new").mkdir()
    moved = write_tar(world.root / "new" / "train-000.tar", other)
    export(world, [moved])
    aligned._opened.cache_clear()  # as in a worker that maps the file only now
    with pytest.raises(CacheDamaged, match=r"train-000\.arrow is not what it was when the run began"):
        text.gather_pairs(everything)
