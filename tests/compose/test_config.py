"""What can be said of the compose files and Dockerfiles without an engine."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROFILES = ("monitoring", "explore")
OVERLAYS = sorted(path.name for path in (ROOT / "docker").glob("compose.*.yaml"))
COMBINATIONS = [
    (files, profiles)
    for files in [()] + [chosen for n in (1, 2, 3) for chosen in itertools.combinations(OVERLAYS, n)]
    for n in range(len(PROFILES) + 1)
    for profiles in itertools.combinations(PROFILES, n)
]


def have_compose() -> bool:
    return (
        shutil.which("docker") is not None
        and not subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode
    )


def config(
    files: tuple[str, ...], profiles: tuple[str, ...], *more: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = ["docker", "compose", "-f", "docker-compose.yml"]
    for name in files:
        command += ["-f", f"docker/{name}"]
    for name in profiles:
        command += ["--profile", name]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LIFT_")}
    return subprocess.run(
        [*command, *more, "config", "-q"],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.skipif(not have_compose(), reason="no docker compose: no configuration was read")
@pytest.mark.parametrize(("files", "profiles"), COMBINATIONS, ids=str)
def test_every_combination_of_files_and_profiles_is_a_configuration(
    files: tuple[str, ...], profiles: tuple[str, ...]
) -> None:
    done = config(files, profiles, LIFT_STORE="s3://bucket/caches")
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "compose warns"


@pytest.mark.skipif(not have_compose(), reason="no docker compose: no configuration was read")
def test_the_example_with_every_line_taken_in_is_a_configuration(tmp_path: Path) -> None:
    example = tmp_path / ".env"
    example.write_text(re.sub(r"^#(?=[A-Z_]+=)", "", (ROOT / ".env.example").read_text(), flags=re.MULTILINE))
    done = config(("compose.gpu.yaml",), PROFILES, "--env-file", str(example))
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not have_compose(), reason="no docker compose: no configuration was read")
def test_two_hosts_without_a_store_are_told_what_to_set() -> None:
    done = config(("compose.two-hosts.yaml",), ())
    assert done.returncode != 0
    assert "LIFT_STORE" in done.stderr and "s3://bucket/prefix" in done.stderr


@pytest.mark.parametrize(
    "dockerfile", sorted((ROOT / "docker").glob("*.Dockerfile")), ids=lambda path: path.name
)
def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert hadolint, "no hadolint: run `make setup`"
    done = subprocess.run([hadolint, dockerfile], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr
