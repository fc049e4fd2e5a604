"""`lift-cache`: every answer also as JSON, every mistake one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lift_cache.bulk import write_cache
from lift_cache.cli import main
from lift_cache.encoding import Encoding
from lift_cache.reader import CacheReader
from lift_cache.recipe import Recipe
from lift_cache.tools.card import describe
from lift_cache.writer import CacheWriter, Rows


@pytest.fixture
def cache(tmp_path: Path, recipe: Recipe, vectors: Callable[..., np.ndarray]) -> Path:
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        writer.put(Rows(["one", "two", "three"], vectors(3), np.full(3, 2), np.array([False, False, True])))
    return tmp_path / "cache"


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, object]:
    main([*argv, "--json"])
    return json.loads(capsys.readouterr().out)


def test_seal_snapshot_info_and_verify_tell_one_story(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, "seal", str(cache)) == {"sealed": 3, "segments": 1}
    made = said(capsys, "snapshot", str(cache))
    assert made["rows"] == 3
    assert said(capsys, "snapshot", str(cache)) == made
    card = said(capsys, "info", str(cache))
    assert card["sealed_rows"] == 3
    assert card["snapshots"] == [
        {"id": made["id"], "rows": 3, "tokens": 6, "truncated": 1, "segments": 1, "provenance": []}
    ]
    content = card["content"]
    assert (content["rows"], content["tokens"], content["truncated"], content["repeated"]) == (3, 6, 1, 0)
    assert content["histogram"] == [[0, 8, 3]]
    assert content["quantiles"] == [2] * 6
    assert content["norms"] == pytest.approx([1, 1, 1], abs=1e-3)
    assert card["not_sealed"] == 0
    assert said(capsys, "verify", str(cache))["problems"] == []


def test_the_mean_cosine_is_that_of_all_pairs(
    tmp_path: Path, recipe: Recipe, vectors: Callable[..., np.ndarray]
) -> None:
    drawn = vectors(30) + 0.3
    names = [f"caption {i}" for i in range(30)]
    write_cache(tmp_path / "cache", recipe, Encoding(dtype="float32", dimensions=24), names, drawn)
    unit = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    pairs = (unit @ unit.T)[~np.eye(30, dtype=bool)]
    assert describe(CacheReader(tmp_path / "cache")).mean_cosine == pytest.approx(pairs.mean(), abs=1e-6)


def test_the_checksum_root_names_the_rows_not_the_files(
    tmp_path: Path, recipe: Recipe, vectors: Callable[..., np.ndarray]
) -> None:
    drawn, encoding = vectors(30), Encoding(dimensions=24)
    names = [f"caption {i}" for i in range(30)]
    write_cache(tmp_path / "one", recipe, encoding, names, drawn)
    write_cache(tmp_path / "many", recipe, encoding, names[::-1], drawn[::-1], segment_rows=7)
    write_cache(tmp_path / "other", recipe, encoding, names, np.roll(drawn, 1, 0))
    one, many, other = (describe(CacheReader(tmp_path / name)) for name in ("one", "many", "other"))
    assert one.root == many.root != other.root


def test_a_cache_is_maintained_from_the_command_line(
    cache: Path, tmp_path: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(5)
    write_cache(
        tmp_path / "other",
        recipe,
        Encoding(dimensions=24),
        ["three", "four", "five"],
        rng.normal(size=(3, 24)).astype(np.float32),
    )
    first = said(capsys, "snapshot", str(cache))
    assert said(capsys, "merge", str(cache), str(tmp_path / "other")) == {
        "added": 2,
        "present": 1,
        "segments": 1,
    }
    again = said(capsys, "adopt", str(cache), str(tmp_path / "other" / "segments"))
    assert (again["added"], again["present"]) == (0, 3)
    merged = said(capsys, "compact", str(cache), "--all")
    assert (merged["merged"], merged["segments"]) == (2, 1)
    second = said(capsys, "snapshot", str(cache))
    assert second["rows"] == 5
    assert len(said(capsys, "gc", str(cache))["removed"]) == 2, (
        "the first snapshot names one segment of the two"
    )
    assert said(capsys, "snapshot", "keep", str(cache), "1") == {"removed": [first["id"]]}
    assert said(capsys, "gc", str(cache), "--dry-run")["bytes"] > 0
    assert len(said(capsys, "gc", str(cache))["removed"]) == 2
    assert said(capsys, "verify", str(cache))["problems"] == []
    assert said(capsys, "snapshot", "rm", str(cache), "2") == {"removed": [second["id"]]}


def test_verify_fails_on_damage_and_names_the_file(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "snapshot", str(cache))
    segment = next((cache / "segments").glob("*[0-9a-f].captions.arrow"))
    segment.write_bytes(segment.read_bytes()[:-1])
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(cache)])
    assert ended.value.code == 1
    assert segment.name in capsys.readouterr().out


@pytest.mark.parametrize("command", ["info", "seal", "snapshot", "verify", "compact", "gc", "repair"])
def test_no_such_cache_is_one_line(command: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lift_cache.cli", command, str(tmp_path / "nothing")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "is not a cache" in done.stderr
    assert not (tmp_path / "nothing").exists()


def test_a_wrong_flag_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["info"], ["info", "x", "--jsn"], ["inof", "x"]):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_cache_in_use_is_said_to_be_in_use(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with CacheWriter.open(cache), pytest.raises(SystemExit) as ended:
        main(["snapshot", str(cache)])
    assert ended.value.code == 2
    assert "has a writer already" in capsys.readouterr().err
