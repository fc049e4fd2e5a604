"""What a user reads in .env.example is what the compose files do, and every service is as locked down as it says."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
MAIN = ROOT / "docker-compose.yml"
FILES = [MAIN, *sorted((ROOT / "docker").glob("compose.*.yaml"))]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
EXAMPLE = ROOT / ".env.example"
ONLY_IN_CI = {"LIFT_WHEELS"}
"""Explained in docker/compose.ci.yaml itself, and of no use to anybody else."""


class Loader(yaml.SafeLoader):
    """YAML with compose's own tags, which only say how two files are joined."""


Loader.add_multi_constructor("!", lambda loader, _, node: loader.construct_mapping(node, deep=True))


def services(path: Path) -> dict[str, dict[str, Any]]:
    return dict(yaml.load(path.read_text(), Loader)["services"])


def used(path: Path) -> Iterator[tuple[str, str]]:
    """Variables of a compose file, each with its default."""
    text = re.sub(r"^ *#.*", "", path.read_text(), flags=re.MULTILINE)
    yield from re.findall(r"(?<!\$)\$\{([A-Z_]+)(?::-([^}]*)|:\?[^}]*)?\}", text)


def documented() -> dict[str, str]:
    """Variables of .env.example, each with the default that it gives."""
    return dict(re.findall(r"^#?([A-Z_]+)=(\S*)", EXAMPLE.read_text(), re.MULTILINE))


def defaults() -> dict[str, str]:
    """Variables of all compose files; where overlays differ, the default of docker-compose.yml."""
    found = {name: default for path in reversed(FILES) for name, default in used(path)}
    return {name: default for name, default in found.items() if name not in ONLY_IN_CI}


def test_every_variable_is_documented_and_every_documented_one_is_used() -> None:
    assert set(documented()) == set(defaults())


def test_documented_defaults_are_those_that_hold_when_nothing_is_set() -> None:
    assert documented() == defaults()


def test_a_copy_of_the_example_changes_nothing() -> None:
    assert not [line for line in EXAMPLE.read_text().splitlines() if line and not line.startswith("#")]


def test_what_is_published_is_published_on_loopback_alone() -> None:
    ports = [port for path in FILES for one in services(path).values() for port in one.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_service_has_a_read_only_root_no_capabilities_and_an_init() -> None:
    made = {
        name: one
        for path in FILES
        for name, one in services(path).items()
        if "image" in one and "command" in one
    }
    assert {"keys", "data", "embedder", "fill", "trainer", "report", "pages", "push", "pull"} <= set(made)
    for name, one in made.items():
        assert one["read_only"] and one["init"], name
        assert one["cap_drop"] == ["ALL"] and one["security_opt"] == ["no-new-privileges:true"], name
        assert one["restart"], f"{name}: say what happens when it ends"


def test_no_secret_is_in_an_environment_and_no_password_has_a_default() -> None:
    for path in FILES:
        for name, one in services(path).items():
            for variable in one.get("environment", {}):
                if re.search("TOKEN$|PASSWORD|SECRET|_KEY$|_KEYS$", variable):
                    pytest.fail(
                        f"{path.name}: {name} has {variable} in its environment; hand it over as a file"
                    )


def test_the_trainer_reads_the_cache_and_cannot_write_it() -> None:
    for name in ("trainer", "report"):
        assert "cache:/cache:ro" in services(MAIN)[name]["volumes"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_name_no_frontend_and_no_host_that_cannot_be_replaced(path: Path) -> None:
    text = path.read_text()
    assert "# syntax=" not in text
    instructions = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    assert all(line.startswith("ARG ") for line in instructions if "://" in line)
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    for base in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
        assert base in ("scratch", "${PYTHON_IMAGE}") or re.search(
            rf"^FROM \S+ AS {base}$", text, re.MULTILINE
        )


def test_images_have_the_version_of_the_packages() -> None:
    versions = {
        tomllib.loads(path.read_text())["project"]["version"]
        for path in (ROOT / "shared/pyproject.toml", *ROOT.glob("services/*/pyproject.toml"))
    }
    labelled = {
        found for path in DOCKERFILES for found in re.findall(r"^ARG VERSION=(\S+)", path.read_text(), re.M)
    }
    assert labelled == versions == {documented()["LIFT_VERSION"]}
