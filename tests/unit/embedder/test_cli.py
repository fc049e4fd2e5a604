"""The command line: one definition for flags, environment and YAML, and one line for a mistake."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from lift_cache.encoding import Encoding
from lift_cache.errors import CacheFull
from lift_cache.recipe import Recipe
from lift_embedder import cli
from lift_embedder.config import FillConfig, ServeConfig

pytestmark = pytest.mark.slow


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeConfig]:
    """The settings with which a server would have been started."""
    configs: list[ServeConfig] = []
    monkeypatch.setattr("lift_embedder.server.serve", configs.append)
    return configs


def run(*arguments: str) -> int:
    try:
        cli.main(list(arguments))
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_flags_win_over_environment_and_environment_over_yaml(
    served: list[ServeConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "serve.yaml"
    settings.write_text("cache: from-yaml\nmodel: minilm\nport: 1111\npooling: cls\nmax_tokens: 12\n")
    monkeypatch.setenv("LIFT_PORT", "2222")
    monkeypatch.setenv("LIFT_POOLING", "last")
    run("serve", "--config", str(settings), "--pooling", "mean", "--no-end-token")
    (config,) = served
    assert (config.cache, config.model, config.max_tokens) == (Path("from-yaml"), "minilm", 12)
    assert (config.port, config.pooling, config.end_token) == (2222, "mean", False)


def test_unset_recipe_options_leave_the_named_recipe_alone(served: list[ServeConfig]) -> None:
    run("serve", "--cache", "c", "--model", "minilm")
    assert served[0].chosen() == {}


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--cache", "c"],
        ["serve", "--cache", "c", "--model", "m", "--pooling", "sum"],
        ["serve", "--cache", "c", "--model", "m", "--port", "70000"],
        ["serve", "--cache", "c", "--model", "m", "--config", "nowhere.yaml"],
        ["serve", "--cache", "c", "--model", "m", "--nonsense"],
        ["fill", "a.txt", "--batch", "0"],
        ["fill"],
        ["nonsense"],
    ],
)
def test_a_mistake_on_the_command_line_is_no_traceback(
    arguments: list[str], served: list[ServeConfig], capsys: Any
) -> None:
    assert run(*arguments) != 0
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err and not served


def test_help_shows_examples_and_every_setting(capsys: Any) -> None:
    run("--help")
    assert "lift-embed serve --cache" in " ".join(capsys.readouterr().out.split())
    for command, config in (("serve", ServeConfig), ("fill", FillConfig)):
        run(command, "--help")
        said = capsys.readouterr().out
        for name, field in config.model_fields.items():
            assert f"--{name.replace('_', '-')}" in said and field.description, name


def test_recipes_lists_every_named_recipe(capsys: Any) -> None:
    run("recipes")
    said = capsys.readouterr().out
    assert "qwen3" in said and "minilm" in said


def test_a_setting_without_a_name_is_one_line(served: list[ServeConfig], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "serve.yaml").write_text("1: 2\n")
    assert run("serve", "--config", str(tmp_path / "serve.yaml")) == 2
    assert "1 is not the name of a setting" in capsys.readouterr().err


def test_a_fill_that_leaves_captions_out_says_which_and_ends_with_status_1(
    tmp_path: Path, capsys: Any
) -> None:
    source = tmp_path / "captions.jsonl"
    rows = ["a good caption", "", 7, None, "\ud800"]
    source.write_text("\n".join(json.dumps({"caption": caption}) for caption in rows) + "\n")
    assert run("fill", str(source), "--dry-run") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "4 captions were left out" in line and "captions.jsonl:2" in line


def test_a_summary_that_cannot_be_written_is_found_before_the_run(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "captions.txt").write_text("a dog\n")
    summary = tmp_path / "nowhere" / "s.json"
    assert run("fill", str(tmp_path / "captions.txt"), "--dry-run", "--summary", str(summary)) == 2
    assert "--summary" in capsys.readouterr().err


def test_a_summary_that_fails_at_the_end_does_not_hide_why_the_run_ended(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise CacheFull("no space left")

    monkeypatch.setattr("lift_embedder.fill.write_atomic", full)
    (tmp_path / "captions.txt").write_text("\n\n")
    run("fill", str(tmp_path / "captions.txt"), "--dry-run", "--summary", str(tmp_path / "s.json"))
    said = capsys.readouterr().err
    assert "there is no caption in it" in said and "no summary was written" in said


def test_a_fill_stops_waiting_for_a_server_that_has_become_read_only(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    looks = iter([None])
    card: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"),
        "fingerprint": recipe.fingerprint,
        "encoding": Encoding(dimensions=recipe.dimensions).model_dump(mode="json"),
        "rows": 0,
    }

    def answer(self: Any, method: str, path: str, **_: Any) -> httpx.Response:
        if path == "/v1/cache":
            return httpx.Response(200, json={**card, "read_only": next(looks, "it no longer agrees")})
        return httpx.Response(503, json={"error": {"message": "read-only"}}, headers={"Retry-After": "0.1"})

    monkeypatch.setattr(httpx.Client, "request", answer)
    (tmp_path / "captions.txt").write_text("".join(f"a dog {i}\n" for i in range(100)))
    began = time.monotonic()
    assert run("fill", str(tmp_path / "captions.txt"), "--batch", "1", "--wait-server", "60") == 2
    assert time.monotonic() - began < 20
    assert "is read-only: it no longer agrees" in capsys.readouterr().err
