"""A damaged cache can be made whole: what proves itself stays, the rest is listed to be filled again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lift_cache import files
from lift_cache.cli import main
from lift_cache.errors import CacheFull, StorageFailed
from lift_cache.keys import caption_keys
from lift_cache.recipe import Recipe
from lift_cache.tools.repair import mend
from lift_cache.verify import verify
from lift_cache.writer import CacheWriter, Rows

Vectors = Callable[..., np.ndarray]


def names(start: int, stop: int) -> list[str]:
    return [f"caption number {i}" for i in range(start, stop)]


@pytest.fixture
def drawn(vectors: Vectors) -> np.ndarray:
    return vectors(50)


@pytest.fixture
def cache(tmp_path: Path, recipe: Recipe, drawn: np.ndarray) -> Path:
    """Three segments of ten rows under a snapshot, and twenty rows that are not sealed."""
    path = tmp_path / "cache"
    with CacheWriter.open(path, recipe) as writer:
        for start, stop in ((0, 10), (10, 20), (20, 30), (30, 40), (40, 50)):
            rows = Rows(names(start, stop), drawn[start:stop], np.ones(10), np.zeros(10))
            writer.put(rows)
            if stop <= 30:
                writer.snapshot()
    return path


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


def vector_files(cache: Path) -> list[Path]:
    return sorted(
        path for path in (cache / "segments").glob("*.arrow") if not path.name.endswith("captions.arrow")
    )


def require_right(cache: Path, drawn: np.ndarray, there: int) -> None:
    with CacheWriter.open(cache) as writer:
        hits = writer.get(caption_keys(names(0, 50)))
        assert hits.found.sum() == there == writer.rows
        expected = drawn.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(hits.vectors[hits.found], expected[hits.found])
        writer.snapshot()
    assert not verify(cache).problems


def test_nothing_damaged_changes_nothing(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(cache.rglob("*"))
    main(["repair", str(cache)])
    assert capsys.readouterr().out == "nothing is damaged\n"
    assert sorted(cache.rglob("*")) == before


def test_one_bad_row_costs_one_row_and_its_caption_is_listed(
    cache: Path, drawn: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    path = vector_files(cache)[1]
    where = path.read_bytes()
    row = next(i for i in range(50) if where.find(drawn[i].astype(np.float16).tobytes()) > 0)
    flip(path, where.find(drawn[row].astype(np.float16).tobytes()) + 3)
    assert verify(cache).problems
    main(["repair", str(cache), "--dry-run", "--json"])
    promised = json.loads(capsys.readouterr().out)
    assert path.exists()
    main(["repair", str(cache), "--json"])
    done = json.loads(capsys.readouterr().out)
    assert promised["quarantined"] == done["quarantined"]
    assert (done["lost"], done["unnamed"]) == (1, 0)
    assert Path(done["refill"]).read_text() == f"caption number {row}\n"
    assert (cache / "quarantine" / path.name).exists()
    require_right(cache, drawn, 49)


def test_a_segment_that_cannot_be_parsed_gives_its_captions_back(cache: Path, drawn: np.ndarray) -> None:
    path = vector_files(cache)[0]
    path.write_bytes(path.read_bytes()[:1000])
    done = mend(cache)
    assert done.lost == 10 and done.refill is not None
    assert len(Path(done.refill).read_text().splitlines()) == 10
    require_right(cache, drawn, 40)


def test_a_missing_segment_gives_its_captions_back(cache: Path, drawn: np.ndarray) -> None:
    vector_files(cache)[0].unlink()
    done = mend(cache)
    assert done.lost == 10
    require_right(cache, drawn, 40)


def test_damaged_captions_do_not_cost_their_vectors(cache: Path, drawn: np.ndarray) -> None:
    path = sorted((cache / "segments").glob("*.captions.arrow"))[0]
    data = path.read_bytes()
    flip(path, data.find(b"caption number") + 3)
    done = mend(cache)
    assert done.lost == 0
    require_right(cache, drawn, 50)


def test_a_bad_row_that_was_not_sealed_is_listed_and_the_others_are_sealed(
    cache: Path, drawn: np.ndarray
) -> None:
    data = cache / "live" / "data.mdb"
    flip(data, data.read_bytes().find(drawn[45].astype(np.float16).tobytes()) + 2)
    done = mend(cache)
    assert done.quarantined == ["live"] and done.lost == 1
    assert Path(str(done.refill)).read_text() == "caption number 45\n"
    require_right(cache, drawn, 49)


def test_a_live_tier_that_cannot_be_read_at_all_is_rebuilt_from_the_segments(
    cache: Path, drawn: np.ndarray
) -> None:
    (cache / "live" / "data.mdb").write_bytes(b"\xff" * 40_960)
    assert any("live" in problem for problem in verify(cache).problems)
    mend(cache)
    require_right(cache, drawn, 30)
    assert (cache / "quarantine" / "live").is_dir()


def test_without_room_to_salvage_nothing_is_put_aside(
    cache: Path, drawn: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = drawn[0].astype(np.float16).tobytes()
    path = next(path for path in vector_files(cache) if first in path.read_bytes())
    flip(path, path.read_bytes().find(first))
    before = {one: one.stat().st_size for one in cache.rglob("*") if one.is_file()}
    with monkeypatch.context() as full:
        full.setattr(files, "free_bytes", lambda _: 0)
        with pytest.raises(CacheFull, match="no space left for what is to be salvaged"):
            mend(cache)
    # The estimate was right and the disk filled up all the same.
    with monkeypatch.context() as broken:
        broken.setenv("PYTHONPATH", str(Path(__file__).parent / "broken_disk"))
        with pytest.raises(StorageFailed, match="nothing was put aside"):
            mend(cache)
    assert {one: one.stat().st_size for one in cache.rglob("*") if one.is_file()} == before
    mend(cache)
    with CacheWriter.open(cache) as writer:
        assert writer.rows >= 49
