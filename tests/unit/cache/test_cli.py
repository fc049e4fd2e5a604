"""`lift-cache`: every answer also as JSON, every mistake one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lift_cache.cli import main
from lift_cache.recipe import Recipe
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
    assert card["snapshots"] == [{"id": made["id"], "rows": 3, "tokens": 6, "truncated": 1, "provenance": []}]
    assert said(capsys, "verify", str(cache))["problems"] == []


def test_verify_fails_on_damage_and_names_the_file(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "snapshot", str(cache))
    segment = next((cache / "segments").glob("*[0-9a-f].captions.arrow"))
    segment.write_bytes(segment.read_bytes()[:-1])
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(cache)])
    assert ended.value.code == 1
    assert segment.name in capsys.readouterr().out


@pytest.mark.parametrize("command", ["info", "seal", "snapshot", "verify"])
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
