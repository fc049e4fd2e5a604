"""What a user gets wrong: the service at fault says so in one line, and nothing that depends on it starts."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lift_cache.recipe import Recipe
from lift_cache.writer import CacheWriter
from tests.compose.stack import DOCKER, Stack, docker, pack

pytestmark = pytest.mark.usefixtures("engine")

NO_DRAWING = {"LIFT_SOURCES": "/data/none.txt", "LIFT_RESTART": "no"}
"""Own data, so that `data` draws nothing, and no try but the first."""


def refused(project: Stack, service: str, *, by: str = "fill") -> str:
    """Bring up `by`, which must not start because of `service`; returns the one line that says why."""
    up = project.compose("up", "-d", "--no-build", by, check=False)
    assert up.returncode == 1, up.stdout + up.stderr
    # While it waits for another try it counts as unhealthy.
    assert re.search(rf"{service}-1 (exited \(2\)|is unhealthy)", up.stderr), up.stderr
    assert project.wait_for(service) == 2
    assert project.inspect(by)["State"]["Status"] == "created", "it was never started"
    said = project.said(service)
    lines = set(said)
    assert len(lines) == 1, said
    return lines.pop()


def belongs_to_root(project: Stack, volume: str) -> None:
    """Make a volume before compose does, that the service's user cannot write."""
    name = f"{project.name}_{volume}"
    labels = (f"com.docker.compose.project={project.name}", f"com.docker.compose.volume={volume}")
    docker("volume", "create", *(word for label in labels for word in ("--label", label)), name)
    make = "touch /volume/theirs && chown -R 0:0 /volume && chmod 755 /volume"
    image = project.image("data")
    docker("run", "--rm", "--user", "0:0", "-v", f"{name}:/volume", "--entrypoint", "sh", image, "-c", make)


def test_a_port_that_is_taken(stack: Callable[..., Stack]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        project = stack("port", LIFT_PORT=str(port), **NO_DRAWING)
        up = project.compose("up", "-d", "--no-build", "fill", check=False)
    assert up.returncode == 1
    said = [line for line in up.stderr.splitlines() if "rror" in line]
    assert len(said) == 1
    assert str(port) in said[0] and "already" in said[0]
    assert project.inspect("fill")["State"]["Status"] == "created"


def test_a_wrong_model_name(stack: Callable[..., Stack]) -> None:
    """With restarts, which come to an end."""
    project = stack("model", LIFT_MODEL="minilmm", **NO_DRAWING | {"LIFT_RESTART": "on-failure:1"})
    line = refused(project, "embedder")
    assert "minilmm" in line and "error: " in line
    assert project.inspect("embedder")["RestartCount"] == 1


def test_a_cache_that_cannot_be_written(stack: Callable[..., Stack]) -> None:
    project = stack("unwritable", **NO_DRAWING)
    belongs_to_root(project, "cache")
    line = refused(project, "embedder")
    assert "/cache/demo" in line and "ermission denied" in line


def test_a_cache_of_another_recipe(stack: Callable[..., Stack], recipe: Recipe, tmp_path: Path) -> None:
    CacheWriter.open(tmp_path / "demo", recipe).close()
    project = stack("recipe", **NO_DRAWING)
    project.unpack_cache(pack(tmp_path / "demo", tmp_path / "cache.tar"))
    line = refused(project, "embedder")
    assert "recipes differ: model is 'tests/tiny' in cache /cache/demo and 'minilm'" in line


@pytest.fixture
def gpu_image() -> Iterator[str]:
    """The CPU image under the name of the GPU one: the engine looks for a device before it looks into an image."""
    if "nvidia" in json.loads(docker("info", "--format", "{{json .Runtimes}}").stdout):
        pytest.skip("this engine has GPUs")
    version = "no-gpu-check"
    docker("tag", "lift-embedder:0.1.0-cpu", f"lift-embedder:{version}-gpu")
    yield version
    docker("rmi", f"lift-embedder:{version}-gpu")


def test_no_gpu_where_the_overlay_asks_for_one(stack: Callable[..., Stack], gpu_image: str) -> None:
    project = stack("gpu", DOCKER / "compose.gpu.yaml", LIFT_VERSION=gpu_image, **NO_DRAWING)
    up = project.compose("up", "-d", "--no-build", "embedder", check=False)
    assert up.returncode == 1
    said = [line for line in up.stderr.splitlines() if "rror" in line]
    assert len(said) == 1 and "nvidia" in said[0] and "gpu" in said[0]
    assert project.inspect("embedder")["State"]["Status"] == "created"
