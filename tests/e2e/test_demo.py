"""The main job, as a newcomer runs it: real captions, the real engine, a trained encoder, a report."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lift_cache.reader import CacheReader
from lift_cache.verify import verify
from lift_trainer.cli import train_main

ROOT = Path(__file__).parents[2]
EMBED = ROOT / ".venv" / "embedder" / "bin" / "lift-embed"
REPORT = ROOT / ".venv" / "trainer" / "bin" / "lift-report"
NOBODY = 65534
SMALL_RUN = (
    "--tower vit:width=32,depth=1,heads=2,patch=16 --image-size 32 --batch-size 64 --steps 3 --warmup 1 "
    "--log-every 1 --workers 0 --precision fp32 --no-tensorboard"
).split()


def demo(out: Path) -> str:
    """Run the demo with one epoch; returns what it printed."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "demo.py", "--out", out, "--epochs", "1"],
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    said = demo(out)
    assert "3,566 captions embedded in this run" in said
    return out


@contextlib.contextmanager
def embedder(cache: Path, folder: Path) -> Iterator[str]:
    """A running embedder of the demo's recipe; its address."""
    log = folder / "serve.log"
    with log.open("w") as stderr:
        server = subprocess.Popen(
            [EMBED, "serve", "--cache", cache, "--model", "minilm", "--port", "0"],
            stdout=stderr,
            stderr=stderr,
        )
    try:
        yield address(server, log, r'"url": "(http://[^"]+)"')
    finally:
        server.terminate()
        assert server.wait(60) == 0


def address(server: subprocess.Popen[bytes], log: Path, pattern: str) -> str:
    """What a server that is starting says of itself."""
    give_up = time.monotonic() + 120
    while not (found := re.search(pattern, log.read_text())):
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < give_up
        time.sleep(0.2)
    return found[1]


def test_the_demo_ends_with_a_report_of_what_was_learned(made: Path) -> None:
    page = (made / "report.html").read_text()
    assert len(page) > 50_000
    fill = json.loads((made / "fill.json").read_text())
    assert fill["embedded"] == fill["unique"] == CacheReader(made / "cache").rows
    assert fill["rejected"] == 0
    for run in ("lift", "permuted"):
        scores = json.loads(next((made / run / "eval").glob("retrieval-*.json")).read_text())
        assert scores["details"]["images"] == scores["details"]["captions"] == 191
    assert not verify(made / "cache").problems


def test_the_demo_again_embeds_nothing_takes_seconds_and_says_so(made: Path) -> None:
    before = (made / "report.html").read_bytes()
    started = time.monotonic()
    said = demo(made)
    assert time.monotonic() - started < 20
    assert "0 captions embedded in this run" in said
    assert said.count("already done") == 2 * 7
    assert (made / "report.html").read_bytes() == before


def test_training_needs_only_the_sealed_part_of_the_cache_and_the_right_to_read(
    made: Path, tmp_path: Path
) -> None:
    """With the server stopped, on a copy without live/, as another user."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    shutil.copytree(made / "cache", tmp_path / "cache", ignore=shutil.ignore_patterns("live", "writer.lock"))
    shutil.copytree(made / "data", tmp_path / "data")
    for part in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        part.chmod(part.stat().st_mode | 0o055)
    arguments = [
        "--cache",
        str(tmp_path / "cache"),
        "--data",
        str(tmp_path / "data" / "train-000.tar"),
        *SMALL_RUN,
    ]
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, NOBODY, NOBODY)

    def as_ourselves_then_as_another_user() -> None:
        # Ourselves first, so that everything is imported: another user may not be allowed to read the
        # environment. In one child, because a process that has computed with threads cannot be forked.
        train_main([*arguments, "--run", str(tmp_path / "ours")])
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        train_main([*arguments, "--run", str(theirs / "run")])

    process = multiprocessing.get_context("fork").Process(target=as_ourselves_then_as_another_user)
    process.start()
    process.join(180)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0
    ours_weights, their_weights = (
        next((run / "checkpoints").glob("step-*/model.safetensors")).read_bytes()
        for run in (tmp_path / "ours", theirs / "run")
    )
    assert ours_weights == their_weights


def test_an_interrupted_demo_goes_on_where_it_stopped(made: Path) -> None:
    (made / "stages" / "report.json").unlink()
    (made / "report.html").unlink()
    said = demo(made)
    assert said.count("already done") == 2 * 6
    assert (made / "report.html").exists()


def test_captions_that_the_cache_lacks_can_be_embedded_by_a_running_server(
    made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / "cache", tmp_path / "cache")
    table = tmp_path / "new.csv"
    tar = made / "data" / "test-000.tar"
    with tarfile.open(tar) as shard, table.open("w") as rows:
        rows.write("image,caption\n")
        for member in [m for m in shard if m.name.endswith(".png")][:64]:
            image = shard.extractfile(member)
            assert image is not None
            (tmp_path / member.name).write_bytes(image.read())
            rows.write(f"{member.name},a picture with the name {member.name}\n")
    arguments = ["--cache", str(tmp_path / "cache"), "--data", str(table), *SMALL_RUN]
    with pytest.raises(SystemExit) as refused:
        train_main([*arguments, "--run", str(tmp_path / "refused")])
    assert refused.value.code == 2

    with embedder(tmp_path / "cache", tmp_path) as url:
        missing = ["--on-missing", "embed", "--server", url, "--run", str(tmp_path / "run")]
        train_main([*arguments, *missing])
    train_main([*arguments, *missing])  # the vectors are kept with the run: no server is needed again
    state = json.loads(next((tmp_path / "run" / "checkpoints").glob("step-*/state.json")).read_text())
    assert state["step"] == 3
    assert state["texts"][0]["overlay_digest"]


def test_a_caption_that_is_typed_finds_images_through_the_live_embedder(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "cache", tmp_path / "cache")
    log = tmp_path / "report.log"
    with embedder(tmp_path / "cache", tmp_path) as url, log.open("w") as stderr:
        command = [REPORT, made / "lift", f"control={made / 'permuted'}", "--serve", "--port", "0"]
        page = subprocess.Popen(
            [*command, "--data", made / "data" / "test-000.tar", "--server", url],
            stdout=stderr,
            stderr=stderr,
        )
        try:
            here = address(page, log, r"serving (http://\S+) to this machine")
            give_up = time.monotonic() + 300
            while httpx.get(f"{url}/readyz", timeout=60).status_code != 200:
                assert time.monotonic() < give_up
                time.sleep(0.5)
            asked = httpx.get(here, params={"q": "a boat that nobody has drawn"}, timeout=120)
            assert asked.status_code == 200
            sides = asked.text.split('<ol class="near">')[1:]
            assert [side.count("<li") for side in sides] == [12, 12]
            assert "lift</h2>" in asked.text and "control</h2>" in asked.text
            image = re.search(r'src="(/image/\d+)"', sides[0])
            assert image and httpx.get(here + image[1]).headers["content-type"] == "image/png"
            rows = httpx.get(f"{url}/v1/cache", timeout=60).json()["rows"]
            assert rows == CacheReader(made / "cache").rows + 1  # embedded once, for both runs
        finally:
            page.send_signal(signal.SIGINT)
            assert page.wait(60) == 0
    assert log.read_text().endswith("ended\n")


def test_ctrl_c_in_the_demo_saves_what_was_trained_and_says_how_to_go_on(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    shutil.copytree(made, out)
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--out", str(out), "--epochs", "200"]
    # The terminal's Ctrl-C reaches the whole process group.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("step 20/"):
            os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    process.stdout.close()
    assert "embed: already done" in said
    assert "stopped by SIGINT after step" in said
    assert said.rstrip().endswith("interrupted; run the same command again to go on from here")
    assert "Traceback" not in said
    assert list((out / "lift" / "checkpoints").glob("step-*/model.safetensors"))
