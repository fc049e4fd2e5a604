"""Vectors in other forms: aligned to image shards, as Parquet, as .npy."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lift_cache import files
from lift_cache.bulk import write_cache
from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig, BadSource, CacheDamaged, CacheFull, MissingCaptions
from lift_cache.keys import caption_keys
from lift_cache.reader import CacheReader
from lift_cache.recipe import Recipe
from lift_cache.tools import aligned as aligned_module
from lift_cache.tools import export as export_module
from lift_cache.tools.aligned import Card, members_digest, read_card, shard_samples
from lift_cache.tools.export import export_aligned, export_npy, export_parquet

Vectors = Callable[..., np.ndarray]
D = 24


def names(n: int, start: int = 0) -> list[str]:
    return [f"a caption with the number {i}" for i in range(start, start + n)]


@pytest.fixture
def cache(tmp_path: Path, recipe: Recipe, vectors: Vectors) -> Path:
    """100 captions in three segments; tokens and truncated say which."""
    tokens = np.arange(100)
    write_cache(
        tmp_path / "cache",
        recipe,
        Encoding(dimensions=D),
        names(100),
        vectors(100),
        tokens,
        tokens % 7 == 0,
        segment_rows=40,
    )
    return tmp_path / "cache"


def tar(path: Path, samples: list[tuple[str, dict[str, object]]]) -> Path:
    """A WebDataset shard: (key, {extension: bytes, text or JSON value})."""
    with tarfile.open(path, "w") as file:
        for key, members in samples:
            for extension, value in members.items():
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return path


def sample(key: int | str, *captions: object) -> tuple[str, dict[str, object]]:
    return f"{key:0>4}", {"jpg": b"x" * (10 + len(captions)), "json": {"captions": list(captions)}}


def shard(path: Path, numbers: range, captions_each: int = 1) -> Path:
    """A shard whose sample i has captions with the numbers i, i + 1, …"""
    return tar(path, [sample(i, *(names(captions_each, i))) for i in numbers])


def expected(cache: Path, captions: list[str]) -> np.ndarray:
    reader = CacheReader(cache)
    return reader.gather(reader.lookup(caption_keys(captions)))


def opened(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path), "r")).read_all()


# Aligned to image shards


def test_row_i_of_an_aligned_file_is_sample_i_of_its_shard(cache: Path, tmp_path: Path) -> None:
    order = [5, 3, 99, 0, 41, 3]
    source = tar(tmp_path / "train-000.tar", [sample(f"s{n}", names(1, i)[0]) for n, i in enumerate(order)])
    made = export_aligned(str(cache), [str(source)], tmp_path / "out")
    table = opened(tmp_path / "out" / "train-000.arrow")
    assert table["name"].to_pylist() == [f"00s{n}" for n in range(6)]
    captions = [names(1, i)[0] for i in order]
    assert [b"".join(keys) for keys in table["keys"].to_pylist()] == [
        key.tobytes() for key in caption_keys(captions)
    ]
    vectors = np.array([vector for (vector,) in table["vectors"].to_pylist()], np.float16)
    np.testing.assert_array_equal(vectors, expected(cache, captions))
    assert (made.shards, made.written, made.samples, made.pairs, made.missing) == (1, 1, 6, 6, 0)


def test_several_captions_of_a_sample_stand_in_their_order_and_vectors_are_read_without_a_copy(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aligned_module, "BATCH_BYTES", 10 * 5 * D * 2)  # ten samples a batch
    source = tar(tmp_path / "a.tar", [sample(i, *names(1 + i % 5, i)) for i in range(33)])
    export_aligned(str(cache), [str(source)], tmp_path / "out")
    file = pa.ipc.open_file(pa.memory_map(str(tmp_path / "out" / "a.arrow"), "r"))
    card = read_card(tmp_path / "out" / "a.arrow")
    assert card is not None and (card.batch_samples, file.num_record_batches) == (10, 4)
    for i in range(33):
        batch, row = file.get_batch(i // card.batch_samples), i % card.batch_samples
        column = batch.column("vectors")
        first = column.offsets.to_numpy()
        values = column.values.values.to_numpy(zero_copy_only=True).reshape(-1, D)
        np.testing.assert_array_equal(
            values[first[row] : first[row + 1]], expected(cache, names(1 + i % 5, i))
        )


def test_samples_and_captions_that_cannot_be_used_take_no_row(cache: Path, tmp_path: Path) -> None:
    source = tar(
        tmp_path / "a.tar",
        [
            sample(0, names(1)[0]),
            ("0001", {"json": {"captions": names(1, 1)}}),
            sample(2, "  ", 17, names(1, 2)[0]),
            ("0003", {"jpg": b"x", "txt": b"\xff"}),
            sample(4, " "),
            ("0005", {"PNG": b"x", "txt": names(1, 5)[0].encode()}),
        ],
    )
    made = export_aligned(str(cache), [str(source)], tmp_path / "out")
    table = opened(tmp_path / "out" / "a.arrow")
    assert table["name"].to_pylist() == ["0000", "0002", "0005"]
    assert [len(keys) for keys in table["keys"].to_pylist()] == [1, 1, 1]
    assert made.left_out == 5
    assert made.first_left_out[0] == f"{source}:0001: no image (it has json)"


def test_an_aligned_file_says_of_what_it_was_made(cache: Path, tmp_path: Path, recipe: Recipe) -> None:
    source = shard(tmp_path / "a.tar", range(10), 2)
    export_aligned(str(cache), [str(source)], tmp_path / "out")
    card = read_card(tmp_path / "out" / "a.arrow")
    samples = shard_samples(source, None)
    captions = [caption for i in range(10) for caption in names(2, i)]
    assert card == Card(
        shard="a.tar",
        members=members_digest(
            [f"{i:04}" for i in range(10)],
            np.full(10, 12),
            np.arange(0, 22, 2),
            caption_keys(captions),
        ),
        samples=10,
        pairs=20,
        missing=0,
        batch_samples=(64 << 20) // (2 * 2 * D),
        snapshot=CacheReader(cache).snapshot_id,
        recipe=recipe,
        fingerprint=recipe.fingerprint,
        encoding=Encoding(dimensions=D),
    )
    assert samples.captions == captions
    metadata = opened(tmp_path / "out" / "a.arrow").schema.metadata
    assert json.loads(metadata[b"lift.aligned"])["recipe"] == recipe.model_dump(mode="json")


def test_the_digest_of_a_shard_tells_names_images_captions_and_their_order_apart(tmp_path: Path) -> None:
    def digest(*samples: tuple[str, dict[str, object]]) -> str:
        return shard_samples(tar(tmp_path / "a.tar", list(samples)), None).members_digest

    one, two = sample(1, "a", "b"), sample(2, "c")
    larger = ("0002", {"jpg": b"x" * 99, "json": {"captions": ["c"]}})
    variants = [
        (one, two),
        (two, one),
        (one,),
        (sample(1, "b", "a"), two),
        (sample(1, "a"), sample(2, "b", "c")),
    ]
    digests = [digest(*variant) for variant in variants] + [
        digest(one, larger),
        digest(sample(3, "a", "b"), two),
    ]
    assert len(set(digests)) == len(digests)
    assert digest(one, two) == digests[0]
    assert digest(sample(1, " a", "b  "), two) == digests[0]  # equal keys


def test_files_that_are_right_are_left_and_others_are_written_again(
    cache: Path, tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    shards = [str(shard(tmp_path / f"{n}.tar", range(n * 10, n * 10 + 10))) for n in range(3)]
    out = tmp_path / "out"
    assert export_aligned(str(cache), shards[:2], out).written == 2
    stamps = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = export_aligned(str(cache), shards, out)
    assert (again.shards, again.written, again.samples) == (3, 1, 30)
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())

    shard(tmp_path / "1.tar", range(50, 60))
    assert export_aligned(str(cache), shards, out).written == 1
    assert opened(out / "1.arrow")["name"].to_pylist()[0] == "0050"

    other = tmp_path / "other"
    write_cache(other, recipe, Encoding(dtype="float32", dimensions=D), names(100), vectors(100, seed=9))
    assert export_aligned(str(other), shards, out).written == 3


def test_a_foreign_file_is_not_overwritten(cache: Path, tmp_path: Path) -> None:
    source = shard(tmp_path / "a.tar", range(3))
    (tmp_path / "a.arrow").write_bytes(b"mine")
    with pytest.raises(BadConfig, match="is not an aligned export"):
        export_aligned(str(cache), [str(source)], tmp_path)
    assert (tmp_path / "a.arrow").read_bytes() == b"mine"


def test_captions_that_the_cache_lacks_are_counted_and_named(cache: Path, tmp_path: Path) -> None:
    good = shard(tmp_path / "0.tar", range(5))
    lacking = tar(tmp_path / "1.tar", [sample(i, *names(2, i)) for i in range(96, 104)])
    with pytest.raises(
        MissingCaptions,
        match=rf"1\.tar: 5 of its captions \('{names(1, 100)[0]}', .*, …\) are not in snapshot",
    ):
        export_aligned(str(cache), [str(good), str(lacking)], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0.arrow"]


def test_missing_vectors_are_null_and_never_zero(cache: Path, tmp_path: Path) -> None:
    lacking = tar(tmp_path / "1.tar", [sample(i, *names(2, i)) for i in range(96, 104)])
    made = export_aligned(str(cache), [str(lacking)], tmp_path / "out", on_missing="null")
    table = opened(tmp_path / "out" / "1.arrow")
    held = [[vector is not None for vector in vectors] for vectors in table["vectors"].to_pylist()]
    assert held == [[True, True]] * 3 + [[True, False]] + [[False, False]] * 4
    np.testing.assert_array_equal(
        np.array(table["vectors"][3].as_py()[0], np.float16), expected(cache, names(1, 99))[0]
    )
    card = read_card(tmp_path / "out" / "1.arrow")
    assert card is not None and card.missing == made.missing == 9


def test_shards_that_would_share_a_file_are_refused(cache: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shard(tmp_path / folder / "0.tar", range(3))
    with pytest.raises(BadConfig, match=r"would both become 0\.arrow"):
        export_aligned(str(cache), [str(tmp_path / "?" / "0.tar")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sources_that_are_no_image_shards_say_so(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a caption\n")
    with pytest.raises(BadSource, match=r"plain \.tar files"):
        export_aligned(str(cache), [str(tmp_path / "a.txt")], tmp_path / "out")
    empty = tar(tmp_path / "empty.tar", [("0", {"json": {"captions": ["a"]}})])
    with pytest.raises(BadSource, match="no sample with an image"):
        export_aligned(str(cache), [str(empty)], tmp_path / "out")


def test_a_damaged_vector_is_never_exported(cache: Path, tmp_path: Path) -> None:
    source = shard(tmp_path / "a.tar", range(100))
    wanted = expected(cache, names(1, 17))[0].tobytes()
    for path in (cache / "segments").glob("*.arrow"):
        data = path.read_bytes()
        if (at := data.find(wanted)) >= 0:
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    for export in (
        lambda: export_aligned(str(cache), [str(source)], tmp_path / "out"),
        lambda: export_parquet(str(cache), tmp_path / "out" / "a.parquet"),
        lambda: export_npy(str(cache), tmp_path / "out" / "npy"),
    ):
        with pytest.raises(CacheDamaged, match="checksum"):
            export()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("form", ["aligned", "parquet", "npy"])
def test_a_killed_export_leaves_nothing_half_and_runs_again(form: str, cache: Path, tmp_path: Path) -> None:
    shards = [str(shard(tmp_path / f"{n}.tar", range(10))) for n in range(40)]
    out = tmp_path / "out"
    target = {"aligned": out, "parquet": out / "a.parquet", "npy": out / "npy"}[form]
    arguments = [str(cache), *(shards if form == "aligned" else []), "--out", str(target)]
    code = (
        "import sys, time\n"
        "from lift_cache.tools import export\n"
        "from lift_cache.reader import CacheReader\n"
        "export.BATCH_BYTES = 1000\n"
        "slow = lambda f: lambda *a, **k: (time.sleep(0.01), f(*a, **k))[1]\n"
        "export._parquet_batch, export._vectors = slow(export._parquet_batch), slow(export._vectors)\n"
        "export.write_aligned = slow(export.write_aligned)\n"
        "export.app(sys.argv[1:])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, form, *arguments], stderr=subprocess.PIPE)
    while not (out.is_dir() and (len(list(out.iterdir())) > 3 or list(out.glob(".tmp-*")))):
        assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    whole = [path for path in out.iterdir() if not path.name.startswith(".")]
    assert all(read_card(path) for path in whole) and len(whole) < 40
    assert not (form != "aligned" and whole)
    if form == "aligned":
        made = export_aligned(str(cache), shards, out)
        assert made.shards == 40 and 40 - len(whole) <= made.written
        export_aligned(str(cache), shards, tmp_path / "fresh")
        for path in (tmp_path / "fresh").iterdir():
            assert (out / path.name).read_bytes() == path.read_bytes()
    elif form == "parquet":
        assert export_parquet(str(cache), target).rows == 100
    else:
        assert export_npy(str(cache), target).rows == 100
    assert not list(out.glob(".tmp-*"))


# Parquet and .npy


def test_parquet_holds_every_row_once_in_bounded_row_groups(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "BATCH_BYTES", 30 * D * 4)
    made = export_parquet(str(cache), tmp_path / "a.parquet")
    file = pq.ParquetFile(tmp_path / "a.parquet")
    assert max(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)) <= 30
    table = file.read()
    assert made.rows == table.num_rows == 100
    captions = table["caption"].to_pylist()
    assert sorted(captions) == sorted(names(100))
    assert b"".join(table["key"].to_pylist()) == caption_keys(captions).tobytes()
    np.testing.assert_array_equal(
        np.array(table["vector"].to_pylist(), np.float32), expected(cache, captions).astype(np.float32)
    )
    numbers = [int(caption.split()[-1]) for caption in captions]
    assert table["tokens"].to_pylist() == numbers
    assert table["truncated"].to_pylist() == [number % 7 == 0 for number in numbers]
    assert table.schema.field("vector").type.value_type == pa.float32()
    card = json.loads(table.schema.metadata[b"lift.card"])
    assert (card["snapshot"], card["rows"], card["dtype"]) == (made.snapshot, 100, "float32")


def test_npy_holds_the_same_rows_and_maps(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "BATCH_BYTES", 30 * D * 4)
    made = export_npy(str(cache), tmp_path / "out" / "npy")
    folder = tmp_path / "out" / "npy"
    vectors, keys = (np.load(folder / name, mmap_mode="r") for name in ("vectors.npy", "keys.npy"))
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    captions = [line["caption"] for line in lines]
    assert sorted(captions) == sorted(names(100))
    assert (vectors.dtype, vectors.shape, keys.shape) == (np.float32, (100, D), (100, 16))
    np.testing.assert_array_equal(keys, caption_keys(captions))
    np.testing.assert_array_equal(vectors, expected(cache, captions).astype(np.float32))
    assert [bytes.fromhex(line["key"]) for line in lines] == [key.tobytes() for key in keys]
    assert [line["tokens"] for line in lines] == [int(caption.split()[-1]) for caption in captions]
    assert json.loads((folder / "card.json").read_text())["snapshot"] == made.snapshot
    assert made.bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_vectors_are_exported_as_stored_when_asked(cache: Path, tmp_path: Path) -> None:
    export_parquet(str(cache), tmp_path / "a.parquet", dtype="stored")
    export_npy(str(cache), tmp_path / "npy", dtype="stored")
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.schema.field("vector").type.value_type == pa.float16()
    vectors = np.load(tmp_path / "npy" / "vectors.npy")
    assert vectors.dtype == np.float16
    np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), np.float16), vectors)
    np.testing.assert_array_equal(vectors, expected(cache, table["caption"].to_pylist()))


def test_a_copy_without_captions_is_exported_without_them(cache: Path, tmp_path: Path) -> None:
    for path in (cache / "segments").glob("*.captions.arrow"):
        path.unlink()
    with pytest.raises(CacheDamaged, match="without captions"):
        export_parquet(str(cache), tmp_path / "a.parquet")
    export_parquet(str(cache), tmp_path / "a.parquet", captions=False)
    assert pq.read_table(tmp_path / "a.parquet").column_names == ["key", "vector", "tokens", "truncated"]
    export_npy(str(cache), tmp_path / "npy", captions=False)
    assert sorted(path.name for path in (tmp_path / "npy").iterdir()) == [
        "card.json",
        "keys.npy",
        "vectors.npy",
    ]


def test_what_exists_is_not_overwritten(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"mine")
    for export in (export_parquet, export_npy):
        with pytest.raises(BadConfig, match="exists"):
            export(str(cache), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"mine"


def test_a_full_disk_is_said_before_anything_is_written(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shard(tmp_path / "a.tar", range(10))
    monkeypatch.setattr(files, "free_bytes", lambda _: 10)
    for export in (
        lambda: export_parquet(str(cache), tmp_path / "out" / "a.parquet"),
        lambda: export_npy(str(cache), tmp_path / "out" / "npy"),
        lambda: export_aligned(str(cache), [str(source)], tmp_path / "out"),
    ):
        with pytest.raises(CacheFull, match="needs about"):
            export()
    assert list((tmp_path / "out").iterdir()) == []


def test_the_commands_answer_in_json(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shard(tmp_path / "a.tar", range(10))

    def said(*argv: str) -> dict[str, object]:
        export_module.app([*argv, "--json"], result_action="return_value")
        return json.loads(capsys.readouterr().out)

    assert said("aligned", str(cache), str(source), "--out", str(tmp_path / "o"))["samples"] == 10
    assert said("parquet", str(cache), "--out", str(tmp_path / "a.parquet"))["rows"] == 100
    assert said("npy", str(cache), "--out", str(tmp_path / "npy"), "--dtype", "stored")["rows"] == 100
