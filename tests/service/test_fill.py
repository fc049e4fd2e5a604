"""Filling a cache from sources: nothing lost, nothing twice, whatever is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lift_cache.keys import caption_keys
from lift_cache.writer import CacheWriter


def write_captions(path: Path, n: int) -> list[str]:
    captions = [f"photo number {i} of {i % 13} old houses by the sea" for i in range(n)]
    path.write_text("\n".join([*captions, *captions[: n // 2]]) + "\n")
    return captions


@pytest.fixture(autouse=True)
def _state_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIFT_STATE", str(tmp_path / "state"))


def test_a_source_is_filled_once_and_again_costs_nothing(
    server: Any, tmp_path: Path, embed_command: Any
) -> None:
    captions = write_captions(tmp_path / "captions.txt", 300)
    summaries = []
    for attempt in ([], [], ["--recheck"]):
        out = tmp_path / "summary.json"
        done = embed_command(
            "fill",
            tmp_path / "captions.txt",
            "--server",
            server.url,
            "--summary",
            out,
            "--batch",
            64,
            *attempt,
        )
        assert done.returncode == 0, done.stderr
        summaries.append(json.loads(out.read_text()))
    first, again, recheck = summaries
    assert (first["rows"], first["unique"], first["embedded"]) == (450, len(captions), len(captions))
    assert (again["files_done"], again["rows_done"], again["rows"]) == (1, 450, 0)
    assert (recheck["cached"], recheck["embedded"], recheck["tokens"]) == (len(captions), 0, 0)


def test_a_dry_run_asks_the_server_what_it_has(server: Any, tmp_path: Path, embed_command: Any) -> None:
    source = tmp_path / "captions.txt"
    source.write_text("".join(f"dry caption {i}\n" for i in range(50)))
    assert embed_command("fill", source, "--server", server.url).returncode == 0
    source.write_text("".join(f"dry caption {i}\n" for i in range(80)))
    done = embed_command("fill", source, "--server", server.url, "--dry-run")
    assert done.returncode == 0 and "50 were cached, 30 to embed" in done.stdout
    assert "on disk: about" in done.stderr and "of the last run into this cache" in done.stderr


def test_bad_captions_are_named_and_counted_up_to_a_limit(
    server: Any, tmp_path: Path, embed_command: Any
) -> None:
    source = tmp_path / "captions.jsonl"
    rows: list[object] = ["a good caption", "", 7, None, "\ud800", "word " * 1000]
    source.write_text("\n".join(json.dumps({"caption": caption}) for caption in rows) + "\n")
    out = tmp_path / "summary.json"
    done = embed_command("fill", source, "--server", server.url, "--summary", out)
    assert done.returncode == 1 and "error: 4 captions were left out" in done.stderr
    summary = json.loads(out.read_text())
    assert (summary["rows"], summary["captions"], summary["rejected"]) == (6, 2, 4)
    assert summary["embedded"] + summary["cached"] == 2
    assert summary["truncated"] == 1
    for row in (2, 3, 4, 5):
        assert re.search(rf"captions\.jsonl:{row}\b", done.stderr)
    done = embed_command("fill", source, "--server", server.url, "--max-bad", 3)
    assert done.returncode == 2 and "--max-bad" in done.stderr


def test_nothing_to_fill_is_an_error(server: Any, tmp_path: Path, embed_command: Any) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for arguments in (
        [tmp_path / "empty.txt"],
        [tmp_path / "none.tar"],
        [tmp_path / "other.csv", "--field", "c"],
        [],
    ):
        done = embed_command("fill", *arguments, "--server", server.url)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1


def test_a_dry_run_counts_and_sends_nothing(tmp_path: Path, embed_command: Any) -> None:
    write_captions(tmp_path / "captions.txt", 100)
    done = embed_command("fill", tmp_path / "captions.txt", "--server", "http://127.0.0.1:9", "--dry-run")
    assert done.returncode == 0 and "100 unique" in done.stdout and "dry run" in done.stdout


def test_a_server_that_stays_away_ends_the_run_in_time(tmp_path: Path, embed_command: Any) -> None:
    write_captions(tmp_path / "captions.txt", 100)
    began = time.monotonic()
    done = embed_command(
        "fill", tmp_path / "captions.txt", "--server", "http://127.0.0.1:9", "--wait-server", 2
    )
    assert done.returncode == 2 and "does not answer" in done.stderr
    assert time.monotonic() - began < 20


def start_fill(source: Path, url: str, *flags: object) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "lift_embedder.cli",
        "fill",
        str(source),
        "--server",
        url,
        *map(str, flags),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_stops_a_fill_and_the_same_command_goes_on(
    server: Any, tmp_path: Path, embed_command: Any
) -> None:
    source = tmp_path / "captions.txt"
    source.write_text("\n".join(f"interrupted caption {i} about the sea" for i in range(3000)) + "\n")
    rows = server.metric("lift_embedded_tokens_total")
    with start_fill(source, server.url, "--batch", 32, "--concurrency", 1) as running:
        while server.metric("lift_embedded_tokens_total") == rows:
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        _, stderr = running.communicate(timeout=20)
    assert running.returncode == 130
    assert "the same command goes on" in stderr and "Traceback" not in stderr
    out = tmp_path / "summary.json"
    done = embed_command("fill", source, "--server", server.url, "--summary", out)
    summary = json.loads(out.read_text())
    assert done.returncode == 0 and summary["cached"] > 0
    assert summary["cached"] + summary["embedded"] == 3000


def test_kill_9_of_the_server_loses_nothing_acknowledged_and_embeds_nothing_twice(
    serve: Callable[..., Any], tmp_path: Path, embed_command: Any, alive: Any, wait_until: Any
) -> None:
    source = tmp_path / "captions.txt"
    captions = write_captions(source, 3000)
    running = serve("--engine", "vllm", "--batch-tokens", 1024).wait_ready()
    children = running.children()
    first = tmp_path / "first.json"
    with start_fill(source, running.url, "--batch", 64, "--wait-server", 1, "--summary", first) as filling:
        assert wait_until(lambda: running.metric("lift_batch_rows_sum") > 300, 60)
        running.stop(signal.SIGKILL)
        _, stderr = filling.communicate(timeout=60)
    assert filling.returncode == 2 and "the same command goes on" in stderr and "Traceback" not in stderr
    acknowledged = json.loads(first.read_text())["embedded"]
    assert acknowledged > 0
    assert wait_until(lambda: not any(alive(pid) for pid in children), 10), "a process was left over"

    again = serve("--engine", "vllm", "--batch-tokens", 1024).wait_ready()
    stored = json.loads(embed_card(again))["rows"]
    assert acknowledged <= stored < len(captions)
    second = tmp_path / "second.json"
    done = embed_command("fill", source, "--server", again.url, "--summary", second)
    summary = json.loads(second.read_text())
    assert done.returncode == 0, done.stderr
    assert (summary["cached"], summary["embedded"]) == (stored, len(captions) - stored)
    assert again.metric("lift_batch_rows_sum") == len(captions) - stored
    assert again.stop() == 0
    with CacheWriter.open(tmp_path / "cache") as cache:
        assert cache.rows == len(captions) and cache.contains(caption_keys(captions)).all()


def embed_card(server: Any) -> str:
    import httpx

    return httpx.get(f"{server.url}/v1/cache").text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with little room; needs the right to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount a small file system: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_stops_a_fill_with_one_line_and_loses_nothing(
    serve: Callable[..., Any], small_disk: Path, tmp_path: Path, embed_command: Any
) -> None:
    source = tmp_path / "captions.txt"
    captions = write_captions(source, 3000)
    running = serve(
        "--engine", "transformers", "--batch-tokens", 1024, cache=small_disk / "cache"
    ).wait_ready()
    done = embed_command("fill", source, "--server", running.url, "--batch", 64)
    assert done.returncode == 2 and "no space left" in done.stderr and "Traceback" not in done.stderr
    acknowledged = int(re.search(r"([\d,]+) captions are in the cache", done.stderr)[1].replace(",", ""))  # type: ignore[index]
    assert acknowledged > 0
    answer = running.embed(captions[:1])
    assert answer.status_code == 200 and answer.json()["data"][0]["cached"]
    assert running.stop() == 0
    with CacheWriter.open(small_disk / "cache") as cache:
        hits = cache.get(caption_keys(captions))
    assert acknowledged <= hits.found.sum() < len(captions)
    assert np.isfinite(hits.vectors).all()
    assert os.path.ismount(small_disk)
