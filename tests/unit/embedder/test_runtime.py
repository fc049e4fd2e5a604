"""What must hold in the engine's child: it dies with its server, and hides what does not load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CHILD = """
import lift_embedder, os, sys, time
hidden = sys.modules.get("torchaudio", "not there") is None
print(os.getpid(), hidden, os.getsid(0) == os.getpid(), flush=True)
time.sleep(60)
"""

PARENT = """
import multiprocessing, os, sys, time
sys.path.insert(0, sys.argv[1])
import child
if __name__ == "__main__":
    os.environ["LIFT_ENGINE_CHILD"] = f"{os.getpid()}:torchaudio"
    multiprocessing.get_context("spawn").Process(target=child.run).start()
    time.sleep(60)
"""


def test_a_spawned_child_hides_what_does_not_load_and_dies_with_a_killed_server(tmp_path: Path) -> None:
    lines = "".join(f"    {line}\n" for line in CHILD.strip().splitlines())
    (tmp_path / "child.py").write_text(f"def run():\n{lines}")
    parent = tmp_path / "parent.py"
    parent.write_text(PARENT)
    with subprocess.Popen([sys.executable, parent, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child, hidden, own_session = process.stdout.readline().split()
        assert (hidden, own_session) == ("True", "True")
        process.send_signal(signal.SIGKILL)
    give_up = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text()


def test_importing_the_package_elsewhere_changes_nothing() -> None:
    code = "import lift_embedder, os; print(os.getsid(0) == os.getpid())"
    for value in (None, f"{os.getpid()}:torchaudio"):
        env = {**os.environ, **({"LIFT_ENGINE_CHILD": value} if value else {})}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "False"
