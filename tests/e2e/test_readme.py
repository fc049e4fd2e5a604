"""Every block of code in the README is tried as it is written, or stands here with the reason why not."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.trainer.conftest import png, write_tar

ROOT = Path(__file__).parents[2]
PORT = 8080
NOT_HERE = {
    "make demo": "tests/e2e/test_demo.py runs it; the line below it runs these tests",
    "docker compose up": "tests/compose runs it, in `make compose-check`",
    "lift-cache push": "needs a bucket; tests/tools/test_remote.py pushes to a stand-in for S3 and pulls",
    "python3.11 -m venv": "needs GPUs, and weights of gigabytes",
}
"""First words of a block that is not run here → why."""

SMALL = {
    "LIFT_TOWER": "vit:width=32,depth=1,heads=2,patch=16",
    "LIFT_TEXT_SHAPE": "context=77,width=32,depth=1,heads=2",
    "LIFT_IMAGE_SIZE": "32",
    "LIFT_POOLING": "mean",
    "LIFT_BATCH_SIZE": "16",
    "LIFT_STEPS": "3",
    "LIFT_WARMUP": "1",
    "LIFT_WORKERS": "0",
}
"""Settings that a user of these blocks would not have, and that change no word of them."""


@dataclass(frozen=True)
class Block:
    language: str
    code: str

    @property
    def not_here(self) -> str | None:
        return next((why for words, why in NOT_HERE.items() if self.code.startswith(words)), None)


def blocks() -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return [Block(language, code) for language, code in found]


def run(block: Block, number: int, folder: Path, environment: dict[str, str]) -> str:
    """What a block prints. What it leaves running in the background goes on."""
    script = folder / f"{number}.{block.language}"
    script.write_text(block.code)
    commands = {
        "bash": ["bash", "-eo", "pipefail"],
        "python": [folder / ".venv" / "embedder" / "bin" / "python"],
    }
    log = folder / f"{number}.log"
    with log.open("w") as said:
        code = subprocess.run(
            [*commands[block.language], script],
            cwd=folder,
            env=environment,
            stdout=said,
            stderr=said,
            check=False,
            timeout=400,
            process_group=0,
        ).returncode
    assert code == 0, f"{block.code}\n{log.read_text()[-4000:]}"
    return log.read_text()


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Code → what it printed, of all blocks that can run here, run in the order in which they stand."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.skip(f"something listens on port {PORT}, which the README's commands use")
    folder = tmp_path_factory.mktemp("readme")
    for part, shards in (("shards", 2), ("held-out", 1)):
        (folder / part).mkdir()
        for shard in range(shards):
            samples = [
                (f"{n:03d}", png(n, (32, 32)), {"caption": f"picture {n} of shard {shard}, {part}"})
                for n in range(32)
            ]
            write_tar(folder / part / f"{shard:03d}.tar", samples)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LIFT_")}
    tools = ":".join(str(ROOT / ".venv" / name / "bin") for name in ("trainer", "embedder"))
    environment = (
        inherited | SMALL | {"PATH": f"{tools}:{os.environ['PATH']}", "LIFT_STATE": str(folder / "state")}
    )
    printed = {}
    try:
        for number, block in enumerate(blocks()):
            if block.not_here is None:
                printed[block.code] = run(block, number, folder, environment)
        yield printed | {"folder": str(folder)}
    finally:
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (entry / "cwd").resolve() == folder:
                    os.kill(int(entry.name), signal.SIGTERM)


def test_every_block_is_run_or_has_a_reason_why_not() -> None:
    found = blocks()
    assert {block.language for block in found} == {"bash", "python"}
    for words in NOT_HERE:
        assert sum(block.code.startswith(words) for block in found) == 1, f"{words!r} is no block any more"
    assert (ROOT / "README.md").read_text().count("```") == 2 * len(found)


def test_the_commands_lead_from_captions_to_a_report(said: dict[str, str]) -> None:
    folder = Path(said["folder"])
    assert len((folder / "report.html").read_text()) > 10_000
    assert list((folder / "caches" / "mine" / "snapshots").iterdir())
    assert list((folder / "runs" / "mine" / "eval").glob("retrieval-*.json"))
    assert list((folder / "runs" / "clip" / "checkpoints").glob("step-*/model.safetensors"))
    assert not (folder / "runs" / "lift").exists(), "a dry run trains nothing"
    assert (folder / "caches" / "small" / "recipe.json").exists()


def test_the_same_caption_over_http_gives_a_vector_by_curl_and_from_python(said: dict[str, str]) -> None:
    by_curl = next(printed for code, printed in said.items() if code.startswith("curl"))
    assert '"embedding"' in by_curl and "error" not in by_curl
    assert sum(code.startswith("from ") for code in said) == 2
