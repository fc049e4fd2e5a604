"""`lift-cache convert`: a new cache with the same captions, and the truth about what storing did to the vectors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lift_cache import files
from lift_cache.cli import main
from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig, CacheDamaged, CacheFull, CacheLocked, CacheNotFound, VectorRejected
from lift_cache.keys import caption_keys
from lift_cache.lock import WriterLock
from lift_cache.reader import CacheReader
from lift_cache.recipe import Recipe
from lift_cache.segment import Segment, check_segment, segment_ids
from lift_cache.snapshot import build_snapshot
from lift_cache.tools import convert as tool
from lift_cache.tools.convert import convert_cache
from lift_cache.tools.overlap import agreement, fit_views, overlap
from lift_cache.writer import CacheWriter, Rows

Vectors = Callable[..., np.ndarray]
ROWS = 400
CAPTIONS = [f"a drawing of thing number {i}" for i in range(ROWS)]


@pytest.fixture
def drawn(vectors: Vectors) -> np.ndarray:
    """float32 [400, 24]: anisotropic, as a language model's vectors are, with one outlier dimension."""
    made = vectors(ROWS) * np.linspace(0.2, 1, 24, dtype=np.float32) + np.linspace(
        -1, 1, 24, dtype=np.float32
    )
    made[:, 3] *= 40
    return made


@pytest.fixture
def cache(tmp_path: Path, recipe: Recipe, drawn: np.ndarray) -> Path:
    """float32, several segments, 400 captions."""
    path = tmp_path / "cache"
    with CacheWriter.open(path, recipe, Encoding(dtype="float32", dimensions=24)) as writer:
        writer.note_provenance({"engine": "tests"})
        for start in range(0, ROWS, 100):
            part = slice(start, start + 100)
            tokens = np.arange(start, start + 100)
            writer.put(Rows(CAPTIONS[part], drawn[part], tokens, tokens % 7 == 0))
            writer.seal()
        writer.snapshot()
    return path


def found(path: Path) -> np.ndarray:
    """Vectors of all captions, decoded and verified: float32 [400, d]."""
    reader = CacheReader(path)
    return reader.encoding.decode(reader.gather(reader.lookup(caption_keys(CAPTIONS)), check=True))


def require_sound(path: Path) -> None:
    """Read every byte of a cache's segments."""
    ids = segment_ids(path / "segments")
    rows = [check_segment(path / "segments", name).rows for name in ids]
    assert sum(rows) == CacheReader(path).rows


def leftovers(path: Path) -> list[Path]:
    return list(path.glob(f"{files.TEMPORARY}*"))


# What the new cache is


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_every_row_is_there_in_the_new_encoding(cache: Path, drawn: np.ndarray, dtype: Any) -> None:
    target = cache.parent / "new" / dtype
    done = convert_cache(str(cache), target, dtype=dtype)
    old, new = CacheReader(cache), CacheReader(target)
    assert (new.rows, new.encoding.dtype, new.dimensions) == (ROWS, dtype, 24)
    assert new.recipe == old.recipe
    step = 2 * np.abs(drawn).max(0) * 2.0**-11 if dtype == "float16" else (drawn.max(0) - drawn.min(0)) / 254
    error = np.abs(found(target) - drawn).max(0)
    assert (error <= 0.501 * step).all()
    assert done.agreement.max_error == pytest.approx(error.max())
    rows, here = old.lookup(caption_keys(CAPTIONS)), new.lookup(caption_keys(CAPTIONS))
    assert new.captions(here) == CAPTIONS
    np.testing.assert_array_equal(new.tokens(here), old.tokens(rows))
    np.testing.assert_array_equal(new.truncated(here), old.truncated(rows))
    require_sound(target)
    assert done.size == sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    assert not leftovers(target.parent)


def test_the_new_cache_takes_more_captions(cache: Path, recipe: Recipe, drawn: np.ndarray) -> None:
    target = cache.parent / "new"
    convert_cache(str(cache), target, dtype="int8")
    with CacheWriter.open(target, recipe) as writer:
        beyond = drawn[:2].copy()
        beyond[1, 5] = 1000.0
        result = writer.put(Rows(["one more", "one too far"], beyond, np.ones(2), np.zeros(2)))
        assert result.stored == 1
        assert "dimension 5 is 1000" in result.rejected[1]
        hits = writer.get(caption_keys([*CAPTIONS, "one more"]))
        assert hits.found.all()
        np.testing.assert_array_equal(hits.vectors[0], hits.vectors[ROWS])
        writer.snapshot()
    assert CacheReader(target).rows == ROWS + 1


def test_the_source_stays_as_it_is(cache: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        return {
            str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(cache.rglob("*"))
        }

    before = state()
    convert_cache(str(cache), cache.parent / "new", dtype="int8")
    assert state() == before


def test_an_older_snapshot_is_converted_as_it_was(cache: Path, recipe: Recipe, drawn: np.ndarray) -> None:
    with CacheWriter.open(cache) as writer:
        writer.put(Rows(["a later caption"], drawn[:1], np.ones(1), np.zeros(1)))
        writer.snapshot()
    convert_cache(f"{cache}@1", cache.parent / "old", dtype="float16")
    convert_cache(str(cache), cache.parent / "new", dtype="float16")
    assert CacheReader(cache.parent / "old").rows == ROWS
    assert CacheReader(cache.parent / "new").rows == ROWS + 1


def test_a_caption_in_two_segments_is_converted_once_with_the_vector_that_counts(
    cache: Path, recipe: Recipe, drawn: np.ndarray, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    with CacheWriter.open(other, recipe, Encoding(dtype="float32", dimensions=24)) as writer:
        writer.put(Rows(CAPTIONS[:10], drawn[:10] + 1, np.ones(10), np.zeros(10)))
        writer.snapshot()
    for path in (other / "segments").iterdir():
        path.rename(cache / "segments" / path.name)
    ids = [info.id for info in CacheReader(cache).manifest.segments]
    ids += [name for name in segment_ids(cache / "segments") if name not in ids]
    infos = [Segment(cache / "segments", name).info() for name in ids]
    build_snapshot(cache, recipe, Encoding(dtype="float32", dimensions=24), infos)
    assert sum(info.rows for info in CacheReader(cache).manifest.segments) == ROWS + 10
    convert_cache(str(cache), cache.parent / "new", dtype="float16")
    new = CacheReader(cache.parent / "new")
    assert sum(info.rows for info in new.manifest.segments) == new.rows == ROWS
    np.testing.assert_array_equal(found(cache.parent / "new"), found(cache).astype(np.float16))


def test_a_cut_keeps_the_first_dimensions_and_the_same_recipe(cache: Path, drawn: np.ndarray) -> None:
    convert_cache(str(cache), cache.parent / "cut", dimensions=10)
    reader = CacheReader(cache.parent / "cut")
    assert (reader.encoding.dtype, reader.dimensions, reader.recipe.dimensions) == ("float32", 10, 24)
    np.testing.assert_array_equal(found(cache.parent / "cut"), drawn[:, :10])


def test_int8_is_cut_without_rounding_again(cache: Path) -> None:
    convert_cache(str(cache), cache.parent / "int8", dtype="int8")
    done = convert_cache(str(cache.parent / "int8"), cache.parent / "cut", dimensions=10)
    assert done.agreement.max_error == 0
    np.testing.assert_array_equal(found(cache.parent / "cut"), found(cache.parent / "int8")[:, :10])


@pytest.mark.parametrize(
    ("first", "second"), [("float16", "float32"), ("int8", "float32"), ("int8", "float16")]
)
def test_nothing_is_won_back_and_that_is_said(cache: Path, first: Any, second: Any) -> None:
    convert_cache(str(cache), cache.parent / "first", dtype=first)
    done = convert_cache(str(cache.parent / "first"), cache.parent / "second", dtype=second)
    assert f"{second} wins nothing back that {first} had rounded away" in done.to_text()
    np.testing.assert_allclose(
        found(cache.parent / "second"),
        found(cache.parent / "first"),
        rtol=2**-10 if second == "float16" else 0,
    )


def test_provenance_goes_along_and_names_the_conversion(cache: Path, recipe: Recipe) -> None:
    convert_cache(str(cache), cache.parent / "new", dtype="int8")
    made, note = CacheReader(cache.parent / "new").manifest.provenance
    assert made == {"engine": "tests"}
    assert CacheReader(cache).snapshot_id in note["converted_from"]
    assert "float32, 24 dimensions" in note["converted_from"]
    with CacheWriter.open(cache.parent / "new") as writer:
        assert writer.provenance() == [made, note]


def test_canaries_go_along_when_they_are_of_this_recipe(cache: Path, recipe: Recipe) -> None:
    canaries = json.dumps({"fingerprint": recipe.fingerprint, "captions": ["a canary"]})
    (cache / "canaries.json").write_text(canaries)
    convert_cache(str(cache), cache.parent / "new", dtype="float16")
    assert (cache.parent / "new" / "canaries.json").read_text() == canaries
    (cache / "canaries.json").write_text(json.dumps({"fingerprint": "0" * 64}))
    convert_cache(str(cache), cache.parent / "newer", dtype="float16")
    assert not (cache.parent / "newer" / "canaries.json").exists()
    (cache / "canaries.json").write_text("{")
    with pytest.raises(CacheDamaged, match=r"canaries\.json is not readable"):
        convert_cache(str(cache), cache.parent / "newest", dtype="float16")
    assert not leftovers(cache.parent)


def test_a_copy_without_captions_is_converted_without_them(cache: Path, drawn: np.ndarray) -> None:
    for path in (cache / "segments").glob("*.captions.arrow"):
        path.unlink()
    done = convert_cache(str(cache), cache.parent / "new", dtype="float16")
    assert "without captions" in done.to_text()
    np.testing.assert_array_equal(found(cache.parent / "new"), drawn.astype(np.float16))
    assert not list((cache.parent / "new" / "segments").glob("*.captions.arrow"))


def test_a_copy_that_lost_some_captions_is_damage(cache: Path) -> None:
    segments = CacheReader(cache).manifest.segments
    if len(segments) == 1:
        pytest.fail("the fixture is meant to have several segments")
    (cache / "segments" / f"{segments[0].id}.captions.arrow").unlink()
    with pytest.raises(CacheDamaged, match="captions"):
        convert_cache(str(cache), cache.parent / "new", dtype="float16")
    assert not (cache.parent / "new").exists()
    assert not leftovers(cache.parent)


# What it says


def test_the_report_says_how_much_was_lost(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = cache.parent / "new"
    main(["convert", str(cache), str(target), "--dtype", "int8", "--json"])
    out, _ = capsys.readouterr()
    said = json.loads(out)
    assert said["rows"] == ROWS
    assert said["before"]["bytes_per_vector"] == 96
    assert said["after"]["bytes_per_vector"] == 24
    assert said["written"] is True
    measured = said["agreement"]
    assert measured["rows"] == ROWS
    assert measured["k"] == [24, 24]
    assert 0.9999 < measured["mean_cosine"] < 1
    assert all(0.9 < measured[view] <= 1 for view in ("raw", "centred", "whitened"))
    main(["convert", str(cache), str(cache.parent / "newer"), "--dtype", "float16"])
    assert "recall@10 overlap raw" in capsys.readouterr().out


def test_a_dry_run_says_the_same_and_writes_nothing(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = cache.parent / "deep" / "new"
    main(["convert", str(cache), str(target), "--dtype", "int8", "--dry-run", "--json"])
    planned = json.loads(capsys.readouterr().out)
    assert not target.parent.exists()
    main(["convert", str(cache), str(target), "--dtype", "int8", "--json"])
    made = json.loads(capsys.readouterr().out)
    assert planned["agreement"] == made["agreement"]
    assert (planned["written"], made["written"]) == (False, True)
    assert 0.5 * made["size"] < planned["size"] < 2 * made["size"] + 100_000


def test_poor_neighbours_are_warned_of_by_view(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert", str(cache), str(cache.parent / "cut"), "--dimensions", "4"])
    warning = capsys.readouterr().err.strip()
    assert warning.startswith("warning: recall@10 overlap below 0.95: ")
    assert "whitened 0." in warning
    assert "keep more dimensions" in warning
    main(["convert", str(cache), str(cache.parent / "half"), "--dtype", "float16"])
    assert "warning" not in capsys.readouterr().err


def test_a_scale_for_each_vector_would_be_caught_by_whitening(vectors: Vectors) -> None:
    # The mistake that the measure is there for: cosine 0.9998, and hardly a neighbour left.
    drawn = vectors(2000, dimensions=32) * 0.01
    drawn[:, :3] = vectors(2000, seed=1, dimensions=3) * 0.01 + 1
    scale = np.abs(drawn).max(1, keepdims=True) / 127
    views = fit_views([drawn], 1e-7)
    per_vector = agreement(drawn, np.rint(drawn / scale) * scale, views, views)
    encoding = Encoding.int8_of_range(drawn.min(0), drawn.max(0))
    per_dimension = agreement(drawn, encoding.decode(encoding.encode(drawn)[0]), views, views)
    assert per_vector.mean_cosine > 0.999
    assert per_vector.whitened is not None
    assert per_vector.whitened < 0.3
    assert "whitened" in per_vector.poor
    assert per_dimension.poor == []


def test_overlap_is_counted_over_all_neighbours() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1100, 16)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = x + 0.1 * rng.normal(size=x.shape).astype(np.float32)
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    near = []
    for v in (x, y):
        cosines = v @ v.T
        np.fill_diagonal(cosines, -1)
        near.append(np.argsort(-cosines, axis=1)[:, :10].tolist())
    shared = sum(len(set(a) & set(b)) for a, b in zip(*near, strict=True))
    assert overlap(x, y) == pytest.approx(shared / (10 * len(x)))
    assert overlap(x, x) == 1
    assert overlap(x, rng.permutation(x)) < 0.05


def test_whitening_takes_no_direction_that_is_noise_or_has_too_few_captions(vectors: Vectors) -> None:
    drawn = vectors(1000, dimensions=40)
    assert fit_views([drawn[:300], drawn[300:]], 1e-7).k == 40
    assert fit_views([drawn[:250]], 1e-7).k == 25
    drawn[:, 30:] *= 1e-9
    assert fit_views([drawn], 1e-7).k == 30
    white = fit_views([drawn[:500], drawn[500:]], 1e-7)
    unit = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    np.testing.assert_allclose(np.cov(((unit - white.mean_d) @ white.projection_dk).T), np.eye(30), atol=5e-3)


def test_too_few_captions_to_compare_are_said_to_be_too_few(
    tmp_path: Path, recipe: Recipe, drawn: np.ndarray
) -> None:
    with CacheWriter.open(tmp_path / "few", recipe) as writer:
        writer.put(Rows(CAPTIONS[:5], drawn[:5], np.ones(5), np.zeros(5)))
        writer.snapshot()
    done = convert_cache(str(tmp_path / "few"), tmp_path / "new", dtype="int8")
    assert (done.agreement.raw, done.agreement.whitened, done.warning) == (None, None, None)
    assert "raw –" in done.to_text()


# What is refused


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dtype", "int4"], "int4"),
        (["--dimensions", "25"], "--dimensions 25: "),
        (["--dimensions", "0"], "keep 1 to 24"),
        (["--dtype", "float32"], "is 24 × float32 already"),
        ([], "choose another --dtype"),
        (["--dtype", "float16", "--dimension", "3"], "--dimension"),
    ],
)
def test_a_bad_flag_is_one_line(cache: Path, flags: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lift_cache.cli", "convert", str(cache), str(cache.parent / "new"), *flags],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not (cache.parent / "new").exists()


def test_a_target_that_is_there_or_inside_the_source_is_refused(cache: Path) -> None:
    (cache.parent / "there").mkdir()
    with pytest.raises(BadConfig, match="exists already"):
        convert_cache(str(cache), cache.parent / "there", dtype="int8")
    with pytest.raises(BadConfig, match="exists already"):
        convert_cache(str(cache), cache, dtype="int8")
    with pytest.raises(BadConfig, match="inside the cache"):
        convert_cache(str(cache), cache / "new", dtype="int8")


def test_no_cache_no_snapshot_and_no_rows_are_refused(tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(CacheNotFound):
        convert_cache(str(tmp_path / "nothing"), tmp_path / "new", dtype="int8")
    with CacheWriter.open(tmp_path / "empty", recipe) as writer:
        with pytest.raises(CacheNotFound, match="no snapshot"):
            convert_cache(str(tmp_path / "empty"), tmp_path / "new", dtype="int8")
        writer.snapshot()
    with pytest.raises(BadConfig, match="no captions"):
        convert_cache(str(tmp_path / "empty"), tmp_path / "new", dtype="int8")
    assert not (tmp_path / "new").exists()


def test_a_disk_without_room_is_refused_before_anything_is_read(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda _: 30_000)
    monkeypatch.setattr(CacheReader, "iter_rows", lambda *_, **__: pytest.fail("rows were read"))
    with pytest.raises(CacheFull, match=r"the converted cache.* needs about 0\.1 MB .*0\.0 MB are free"):
        convert_cache(str(cache), cache.parent / "new", dtype="int8")
    with pytest.raises(CacheFull):
        convert_cache(str(cache), cache.parent / "new", dtype="int8", dry_run=True)
    assert sorted(path.name for path in cache.parent.iterdir()) == ["cache"]


def test_a_vector_that_the_dtype_cannot_hold_stops_the_convert(
    tmp_path: Path, recipe: Recipe, drawn: np.ndarray
) -> None:
    drawn[7, 3] = 1e6
    with CacheWriter.open(tmp_path / "cache", recipe, Encoding(dtype="float32", dimensions=24)) as writer:
        writer.put(Rows(CAPTIONS, drawn, np.ones(ROWS), np.zeros(ROWS)))
        writer.snapshot()
    with pytest.raises(
        VectorRejected, match=r"thing number 7': .*beyond the range of float16.*nothing was written"
    ):
        convert_cache(str(tmp_path / "cache"), tmp_path / "new", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    convert_cache(str(tmp_path / "cache"), tmp_path / "new", dtype="int8")


def test_damage_in_the_source_is_found_and_not_converted(cache: Path) -> None:
    info = CacheReader(cache).manifest.segments[0]
    path = cache / "segments" / f"{info.id}.arrow"
    data = bytearray(path.read_bytes())
    vector = found(cache)[0].tobytes()
    places = [at for name in (cache / "segments").iterdir() if (at := name.read_bytes().find(vector)) >= 0]
    assert places, "the stored bytes of a vector are in the file as they are"
    held = CacheReader(cache)
    rows = np.arange(held.rows)
    own = next(
        held.gather(rows[row : row + 1])[0].tobytes()
        for row in range(ROWS)
        if held.gather(rows[row : row + 1])[0].tobytes() in data
    )
    data[data.find(own) + 5] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(CacheDamaged, match="checksum"):
        convert_cache(str(cache), cache.parent / "new", dtype="float16")
    assert not (cache.parent / "new").exists()
    assert not leftovers(cache.parent)


# Cut off


def broken_after(rows: int, error: type[BaseException]) -> Callable[..., Iterator[Any]]:
    whole = CacheReader.iter_rows

    def broken(self: CacheReader, batch: int = 50, *, captions: bool = False) -> Iterator[Any]:
        done = 0
        for part in whole(self, 50, captions=captions):
            if done >= rows:
                raise error
            yield part
            done += len(part)

    return broken


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_convert_that_is_cut_off_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    monkeypatch.setattr(CacheReader, "iter_rows", broken_after(200, error))
    with pytest.raises(error):
        convert_cache(str(cache), cache.parent / "new", dtype="float16")
    assert sorted(path.name for path in cache.parent.iterdir()) == ["cache"]


def test_ctrl_c_is_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CacheReader, "iter_rows", broken_after(200, KeyboardInterrupt))
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(cache), str(cache.parent / "new"), "--dtype", "float16"])
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip().startswith("interrupted: ")


def test_a_killed_convert_leaves_no_cache_and_the_next_clears_up(cache: Path) -> None:
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from lift_cache.tools import convert\n"
        "convert._compare = lambda *_: os._exit(9)\n"
        "convert.convert_cache(sys.argv[1], Path(sys.argv[2]), dtype='float16')\n"
    )
    target = cache.parent / "new"
    killed = subprocess.run([sys.executable, "-c", code, str(cache), str(target)], check=False)
    assert killed.returncode == 9
    assert not target.exists()
    (left,) = leftovers(cache.parent)
    (left / "segments" / "stale.arrow").write_bytes(b"stale")
    convert_cache(str(cache), target, dtype="int8")
    assert not leftovers(cache.parent)
    assert not (target / "segments" / "stale.arrow").exists()
    require_sound(target)


def test_two_converts_into_one_target_do_not_meet(cache: Path) -> None:
    half = cache.parent / f"{files.TEMPORARY}new"
    half.mkdir()
    lock = WriterLock(half)
    try:
        with pytest.raises(CacheLocked):
            convert_cache(str(cache), cache.parent / "new", dtype="float16")
        assert half.exists()
    finally:
        lock.release()
    convert_cache(str(cache), cache.parent / "new", dtype="float16")


def test_a_large_cache_is_converted_in_batches_and_compared_by_sample(
    cache: Path, drawn: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "BATCH", 64)
    monkeypatch.setattr(tool, "SAMPLE", 100)
    monkeypatch.setattr(tool, "FITTED_PER_DIMENSION", 10)
    done = convert_cache(str(cache), cache.parent / "new", dtype="int8")
    assert done.agreement.rows == 100
    assert done.agreement.k == (24, 24)
    assert (np.abs(found(cache.parent / "new") - drawn) <= (drawn.max(0) - drawn.min(0)) / 500).all()
