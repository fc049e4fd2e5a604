"""The demo in containers, from an empty machine to its report, with the embedder killed on the way.

One project lives through the tests of this file in their order: killed while it fills, asked, read, backed up,
trained from, up again, down.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from lift_cache.reader import CacheReader
from tests.compose.stack import DOCKER, ROOT, SMALL, Stack, docker, free_port, pack, until

pytestmark = pytest.mark.usefixtures("engine")

CAPTIONS = 3_566
"""Distinct names of the demo's emoji."""

KILL = """
import os, pathlib, signal, sys
for folder in sorted(pathlib.Path("/proc").glob("[0-9]*"), key=lambda folder: int(folder.name)):
    words = (folder / "cmdline").read_bytes()
    parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
    if sys.argv[1].encode() in words and parent != "0":
        os.kill(int(folder.name), signal.SIGKILL)
        break
else:
    sys.exit("nothing to kill")
"""
"""Kills one process of a container: not its first one, which is the engine's, nor itself, which has no parent there."""


def tool(*words: object) -> subprocess.CompletedProcess[str]:
    """`lift-cache` as it is installed beside the tests."""
    command = [Path(sys.executable).with_name("lift-cache"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@dataclass
class Pipeline:
    """A project that was brought up, and what happened meanwhile."""

    stack: Stack
    folder: Path
    rows: dict[str, int]
    engine_restarts: int

    def fill(self, folder: Path) -> dict[str, Any]:
        return dict(
            json.loads(self.stack.copy_out("fill", "/state/fill.json", folder / "fill.json").read_text())
        )

    def cache(self, folder: Path) -> Path:
        """A copy of the whole cache on this machine."""
        return self.stack.copy_out("embedder", "/cache/demo", folder / "demo")


def from_the_readme() -> str:
    """Its commands for containers."""
    found = re.findall(
        r"^```bash\n(docker compose up.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S
    )
    assert len(found) == 1
    return str(found[0])


@pytest.fixture(scope="module")
def pipeline(stack: Callable[..., Stack], tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The README's commands, with nothing there; the engine's process is killed during the fill, later the server."""
    project = stack("demo", SMALL, LIFT_BATCH_TOKENS="1024", LIFT_PAGES_PORT=str(free_port()))
    folder = tmp_path_factory.mktemp("up")
    with (folder / "up.log").open("wb") as log:
        up = project.start(from_the_readme(), folder=folder, output=log)
    try:
        until(lambda: up.poll() is not None or project.running("fill"), "fill starts", 600)
        assert up.poll() is None, (folder / "up.log").read_text()
        rows = {}
        with project.client(project.key("read")) as client:

            def stats() -> dict[str, Any]:
                try:
                    return dict(client.get("/v1/stats").raise_for_status().json())
                except httpx.HTTPError:
                    return {}

            def filled() -> int:
                return int(stats().get("cache", {}).get("rows", 0))

            rows["engine"] = until(filled, "the first rows")
            project.compose("exec", "-T", "embedder", "python", "-c", KILL, "EngineCore")
            until(lambda: filled() > max(rows["engine"] + 300, CAPTIONS // 3), "a new engine fills on")
            now = stats()
            rows["server"] = int(now["cache"]["rows"])
            project.compose("exec", "-T", "embedder", "python", "-c", KILL, "lift-embed", check=False)
        code = up.wait(600)
        assert code == 0, (
            f"{(folder / 'up.log').read_text()}\n{project.compose('logs', '--tail', '30').stdout}"
        )
    finally:
        up.terminate()
        up.wait()
    return Pipeline(project, folder, rows, int(now["engine"]["restarts"]))


def test_up_ends_with_a_trained_checkpoint_and_a_report(pipeline: Pipeline, tmp_path: Path) -> None:
    codes = {name: pipeline.stack.exit_code(name) for name in ("keys", "data", "fill", "trainer", "report")}
    assert set(codes.values()) == {0}, codes
    assert pipeline.stack.inspect("embedder")["State"]["Health"]["Status"] == "healthy"
    assert len((pipeline.folder / "report.html").read_text()) > 50_000
    run = pipeline.stack.copy_out("report", "/runs/demo", tmp_path / "run")
    assert list((run / "checkpoints").glob("step-*/model.safetensors"))
    assert list((run / "eval").glob("retrieval-*.json"))


def test_engine_and_server_killed_during_the_fill_cost_no_caption(pipeline: Pipeline, tmp_path: Path) -> None:
    assert 0 < pipeline.rows["engine"] < pipeline.rows["server"] < CAPTIONS
    assert pipeline.engine_restarts == 1
    assert pipeline.stack.inspect("embedder")["RestartCount"] == 1
    summary = pipeline.fill(tmp_path)
    assert summary["unique"] == CAPTIONS and summary["rejected"] == 0
    assert CacheReader(pipeline.cache(tmp_path)).rows == CAPTIONS


def test_the_published_port_wants_a_key_and_answers(pipeline: Pipeline) -> None:
    asked = {"input": ["grinning face", "GRINNING FACE, never seen before"]}
    with pipeline.stack.client() as anybody, pipeline.stack.client(pipeline.stack.key("fill")) as client:
        assert anybody.get("/readyz").status_code == 200
        assert anybody.post("/v1/embeddings", json=asked).status_code == 401
        data = client.post("/v1/embeddings", json=asked).raise_for_status().json()["data"]
    assert [row["cached"] for row in data] == [True, False]
    assert all(len(row["embedding"]) == 384 for row in data)


def test_metrics_can_be_scraped_with_the_key_that_prometheus_is_given(pipeline: Pipeline) -> None:
    with pipeline.stack.client() as anybody, pipeline.stack.client(pipeline.stack.key("read")) as client:
        assert anybody.get("/metrics").status_code == 401
        text = client.get("/metrics").raise_for_status().text
    assert "lift_engine_up 1.0" in text
    assert (
        float(next(line for line in text.splitlines() if line.startswith("lift_cache_rows ")).split()[1])
        >= CAPTIONS
    )


def test_the_version_endpoint_says_what_the_image_is_labelled_with(pipeline: Pipeline) -> None:
    with pipeline.stack.client() as anybody:
        said = anybody.get("/version").json()["lift_embedder"]
    for service in ("embedder", "trainer"):
        labels = pipeline.stack.inspect(service)["Config"]["Labels"]
        assert labels["org.opencontainers.image.version"] == said
        assert labels["org.opencontainers.image.title"] == f"lift-{service}"


@pytest.mark.parametrize(
    ("service", "holds", "lacks"),
    [
        ("embedder", "vllm fastapi lmdb lift_cache lift_embedder", "timm torchvision lift_trainer pip"),
        ("trainer", "torch timm lift_cache lift_trainer", "vllm fastapi uvicorn lmdb lift_embedder pip"),
    ],
)
def test_an_image_holds_what_its_service_needs_and_no_tools(
    pipeline: Pipeline, service: str, holds: str, lacks: str
) -> None:
    look = (
        "import importlib.util as u, json, os, shutil, sys; "
        "print(json.dumps({'found': [m for m in sys.argv[1:] if u.find_spec(m)], 'uid': os.getuid(), "
        "'tools': [t for t in ('gcc', 'make', 'git') if shutil.which(t)], "
        "'caches': [p for p in ('/root/.cache', '/src', '/wheels') if os.path.exists(p)]}))"
    )
    image = pipeline.stack.inspect(service)["Config"]["Image"]
    done = docker(
        *("run", "--rm", "--network", "none", "--read-only", "--entrypoint", "/opt/lift/bin/python", image),
        *("-c", look, *holds.split(), *lacks.split()),
    )
    seen = json.loads(done.stdout)
    assert sorted(seen["found"]) == sorted(holds.split())
    assert seen["uid"] == {"embedder": 10001, "trainer": 10002}[service]
    assert not seen["tools"] and not seen["caches"]


def test_the_reports_can_be_looked_at_in_a_browser(pipeline: Pipeline) -> None:
    pipeline.stack.compose("--profile", "explore", "up", "-d", "--no-build", "--no-deps", "pages")
    address = f"http://127.0.0.1:{pipeline.stack.environment['LIFT_PAGES_PORT']}/demo/report.html"

    def page() -> str:
        try:
            return httpx.get(address, trust_env=False).raise_for_status().text
        except httpx.HTTPError:
            return ""

    assert "<html" in until(page, "the page", 60)


def test_the_command_line_tools_open_what_compose_wrote(pipeline: Pipeline, tmp_path: Path) -> None:
    cache = pipeline.cache(tmp_path)
    tool("verify", cache)
    assert json.loads(tool("info", cache, "--json").stdout)
    assert "grinning face" in tool("lookup", cache, "grinning face").stdout


def test_a_backup_taken_while_serving_and_restored_without_live_has_everything_sealed(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    backup = tmp_path / "backup.tar"
    with pipeline.stack.client(pipeline.stack.key("fill")) as client, backup.open("wb") as file:
        packing = pipeline.stack.start(
            "docker compose exec -T embedder tar -C /cache -cf - "
            "--exclude=live --exclude=live.json '--exclude=.tmp-*' demo",
            folder=tmp_path,
            output=file,
            errors=subprocess.DEVNULL,
        )
        written = 0
        while packing.poll() is None or written == 0:
            client.post(
                "/v1/embeddings", json={"input": [f"written during the backup {written}"]}
            ).raise_for_status()
            written += 1
    assert packing.returncode == 0
    with tarfile.open(backup) as tar:
        tar.extractall(tmp_path / "restored", filter="data")
    original, restored = CacheReader(pipeline.cache(tmp_path)), CacheReader(tmp_path / "restored" / "demo")
    assert restored.rows == original.rows == CAPTIONS
    everything = np.arange(CAPTIONS)
    assert np.array_equal(restored.gather(everything, check=True), original.gather(everything, check=True))
    tool("snapshot", tmp_path / "restored" / "demo")  # a writer opens it, and makes its live tier anew
    tool("verify", tmp_path / "restored" / "demo")


def test_compose_serves_and_trains_from_what_the_command_line_tools_wrote_with_the_embedder_stopped(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    """And SIGTERM ends both properly: the server with status 0, the trainer with what it learned saved."""
    stack = pipeline.stack
    tool("convert", pipeline.cache(tmp_path), tmp_path / "tools", "--dtype", "float32")
    stack.unpack_cache(pack(tmp_path / "tools", tmp_path / "tools.tar"))
    stack.compose("up", "-d", "--no-build", "--no-deps", "embedder", LIFT_CACHE_NAME="tools")
    with stack.client(stack.key("fill")) as client:

        def answer() -> dict[str, Any] | None:
            try:
                asked = client.post("/v1/embeddings", json={"input": ["grinning face"]})
            except httpx.HTTPError:
                return None
            return dict(asked.json()["data"][0]) if asked.status_code == 200 else None

        assert until(answer, "what is cached is answered")["cached"]
    stack.compose("stop", "embedder")
    assert stack.exit_code("embedder") == 0
    settings = ("-e", "LIFT_CACHE=/cache/tools", "-e", "LIFT_RUN=/runs/tools", "-e", "LIFT_EPOCHS=1000")
    trainer = stack.compose("run", "-d", "--no-deps", *settings, "trainer").stdout.strip()
    until(lambda: "step " in said_by(trainer), "the first steps")
    docker("stop", "-t", "60", trainer)
    assert json.loads(docker("inspect", trainer).stdout)[0]["State"]["ExitCode"] == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in said_by(trainer)
    docker("rm", trainer)
    run = stack.copy_out("report", "/runs/tools", tmp_path / "run")
    assert list((run / "checkpoints").glob("step-*/model.safetensors"))


def said_by(container: str) -> str:
    done = docker("logs", container)
    return done.stdout + done.stderr


def test_a_volume_for_runs_that_cannot_be_written_is_named_in_one_line(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o755)
    mount = ("-v", f"{theirs}:/runs", "-e", "LIFT_RUN=/runs/another")
    done = pipeline.stack.compose("run", "--rm", "--no-deps", "-T", *mount, "trainer", check=False)
    assert done.returncode == 2
    said = done.stderr.strip().splitlines()
    assert said[-1] == "error: /runs/another: Permission denied"
    assert sum(line.startswith("error: ") for line in said) == 1 and "Traceback" not in done.stderr


def test_before_an_upgrade_everything_is_sealed_with_the_server_stopped(pipeline: Pipeline) -> None:
    once = ("run", "--rm", "--no-deps", "-T", "--entrypoint", "lift-cache", "embedder")

    def fresh() -> int:
        return int(
            json.loads(pipeline.stack.compose(*once, "info", "/cache/demo", "--json").stdout)["not_sealed"]
        )

    assert fresh() > 0, "what was written during the backup"
    pipeline.stack.compose(*once, "seal", "/cache/demo")
    assert fresh() == 0


def test_up_again_embeds_nothing_and_trains_nothing(pipeline: Pipeline, tmp_path: Path) -> None:
    trained = (
        pipeline.stack.copy_out("report", "/runs/demo", tmp_path / "before") / "metrics.jsonl"
    ).read_bytes()
    pipeline.stack.compose("up", "-d", "--no-build")
    assert pipeline.stack.wait_for("report") == 0
    summary = pipeline.fill(tmp_path)
    assert summary["embedded"] == 0
    again = pipeline.stack.copy_out("report", "/runs/demo", tmp_path / "after") / "metrics.jsonl"
    assert again.read_bytes() == trained


def test_snapshots_reach_a_second_host_through_a_store(
    pipeline: Pipeline, stack: Callable[..., Stack], tmp_path: Path
) -> None:
    """A directory in the place of the bucket, and a folder of the second host with the shards."""
    store = tmp_path / "store"
    store.mkdir()
    store.chmod(0o777)
    mounted = tmp_path / "store.yaml"
    mounted.write_text(
        f"services:\n  push: {{volumes: ['{store}:/store']}}\n  pull: {{volumes: ['{store}:/store:ro']}}\n"
    )
    here = pipeline.stack.with_files(DOCKER / "compose.two-hosts.yaml", mounted, LIFT_STORE="/store/demo")
    here.compose("run", "--rm", "--no-deps", "push")
    own = {"LIFT_DATA_DIR": str(pipeline.stack.copy_out("data", "/data/emoji", tmp_path / "data"))}
    own |= {
        "LIFT_SOURCES": "/data/*.tar",
        "LIFT_TRAIN_DATA": "/data/train-*.tar",
        "LIFT_TEST_DATA": "/data/test-*.tar",
    }
    there = stack("there", SMALL, DOCKER / "compose.two-hosts.yaml", mounted, LIFT_STORE="/store/demo", **own)
    there.compose("up", "-d", "--no-build", "report")
    assert there.wait_for("report") == 0
    assert not there.compose("ps", "-aq", "embedder").stdout
    assert (
        len((there.copy_out("report", "/runs/demo", tmp_path / "run") / "report.html").read_text()) > 50_000
    )


def test_down_with_volumes_leaves_nothing(pipeline: Pipeline) -> None:
    assert len(pipeline.stack.left_behind()) > 8
    started = time.monotonic()
    pipeline.stack.compose("--profile", "explore", "down", "-v")
    assert not pipeline.stack.left_behind()
    assert time.monotonic() - started < 60, "a service did not stop when it was told to"
