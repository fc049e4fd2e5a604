"""The losses of every preset, in small: 50 steps on generated shapes, in fp32 on one thread.

    .venv/trainer/bin/python scripts/losses.py                     compare with tests/golden/losses.json
    .venv/trainer/bin/python scripts/losses.py --parent            compare with the commit before, in one run
    .venv/trainer/bin/python scripts/losses.py --write             take what comes out as what is right

Towers, batches and data are small; losses, masks, heads, optimisers and schedules are the preset's. Text vectors are
hashed n-grams, so no language model is needed. The numbers hold to the bit for one version of torch on one kind of CPU,
which is what they are stored under; elsewhere within 1e-4.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests/golden/losses.json"
STEPS, TOLERANCE = 50, 1e-4
TOWER, SIDE = "vit_tiny_patch16_224", 32
JOINT = ("clip", "lit")

Losses = dict[str, list[float]]


def platform() -> str:
    """What the bits depend on: `torch-2.14.1-AVX512`."""
    import torch

    return f"torch-{torch.__version__.partition('+')[0]}-{torch.backends.cpu.get_cpu_capability()}"


def losses() -> Losses:
    """Preset → loss of each step. Those with a trained text tower only where open_clip is installed."""
    import timm
    import torch
    import yaml
    from safetensors.torch import save_file

    from lift_trainer.commands import presets
    from lift_trainer.config import TrainConfig
    from lift_trainer.job import prepare
    from lift_trainer.loop import train

    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        made = [
            sys.executable,
            "-c",
            "from lift_trainer.cli import data_main; data_main()",
            "shapes",
            str(root / "data"),
        ]
        subprocess.run([*made, "--train", "1200"], check=True, capture_output=True)
        torch.manual_seed(0)
        save_file(timm.create_model(TOWER, num_classes=0).state_dict(), root / "tower.safetensors")
        for name, file in sorted(presets().items()):
            if name in JOINT and importlib.util.find_spec("open_clip") is None:
                continue
            settings: dict[str, Any] = yaml.safe_load(file.read_text())
            small: dict[str, Any] = {
                "tower": TOWER,
                "image_size": SIDE,
                "batch_size": 32,
                "steps": STEPS,
                "warmup": "5",
            }
            if settings.get("start") == "frozen":
                small["weights"] = root / "tower.safetensors"
            if name in JOINT:
                small["text_shape"] = "context=32,width=32,depth=2,heads=2"
            else:
                small["text_control"] = "ngram-hash"
            if "dimensions" in settings:
                small["dimensions"] = 64
            run = {
                "data": [str(root / "data" / "train-*.tar")],
                "run": root / name,
                "device": "cpu",
                "precision": "fp32",
                "workers": 0,
                "log_every": 1,
                "tensorboard": False,
            }
            train(prepare(TrainConfig.model_validate(settings | small | run)))
            lines = (root / name / "metrics.jsonl").read_text().splitlines()
            found[name] = [json.loads(line)["loss"] for line in lines]
    return found


def differences(ours: Losses, theirs: Losses, tolerance: float) -> list[str]:
    """One line per preset whose losses are further apart than `tolerance` (0: to the bit)."""
    said = []
    for name in sorted(ours.keys() & theirs.keys()):
        apart = [abs(a - b) for a, b in zip(ours[name], theirs[name], strict=True)]
        if not max(apart) <= tolerance:
            step = next(i for i, distance in enumerate(apart) if not distance <= tolerance)
            said.append(f"{name}: {ours[name][step]!r} at step {step + 1}, was {theirs[name][step]!r}")
    return said


def stored(root: Path) -> dict[str, Losses]:
    """Platform → losses, as a checkout has them."""
    try:
        return dict(json.loads((root / "tests/golden/losses.json").read_text()))
    except OSError:
        return {}


def against_golden(ours: Losses) -> tuple[str, list[str]]:
    """What they were compared with, and what differs."""
    every, here = stored(ROOT), platform()
    if here in every:
        return f"{here}, to the bit", differences(ours, every[here], 0)
    other = next(iter(every))
    return f"{other} on {here}, within {TOLERANCE}", differences(ours, every[other], TOLERANCE)


def against_parent(ours: Losses) -> tuple[str, list[str]]:
    """As `against_golden`, with the code of the commit before, run here and now."""
    git = ["git", "-C", str(ROOT)]
    parent = subprocess.run(
        [*git, "rev-parse", "--verify", "-q", "HEAD^"], capture_output=True, text=True, check=False
    )
    if parent.returncode:
        return "NOT COMPARED with the commit before: this checkout has none", []
    name = parent.stdout.strip()
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        subprocess.run(
            [*git, "worktree", "add", "-q", "--detach", str(tree), name], check=True, capture_output=True
        )
        try:
            if not (tree / "scripts/losses.py").exists():
                return f"NOT COMPARED with {name[:9]}: it has no scripts/losses.py", []
            if stored(tree) != stored(ROOT):
                return (
                    f"NOT COMPARED with {name[:9]}: tests/golden/losses.json says that the losses changed",
                    [],
                )
            path = os.pathsep.join(str(tree / part) for part in ("shared", "services/trainer"))
            out = Path(directory) / "losses.json"
            subprocess.run(
                [sys.executable, str(tree / "scripts/losses.py"), "--out", str(out)],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
            return f"commit {name[:9]}, to the bit", differences(ours, json.loads(out.read_text()), 0)
        finally:
            subprocess.run(
                [*git, "worktree", "remove", "--force", str(tree)], check=True, capture_output=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parent", action="store_true", help="also compare with the commit before")
    parser.add_argument("--write", action="store_true", help="store the losses of this platform")
    parser.add_argument("--out", type=Path, help="write them there and compare nothing")
    given = parser.parse_args()
    ours = losses()
    if given.out:
        given.out.write_text(json.dumps(ours))
        return
    if given.write:
        GOLDEN.write_text(json.dumps(stored(ROOT) | {platform(): ours}, indent=1) + "\n")
        print(f"stored as {platform()} in {GOLDEN.relative_to(ROOT)}")
        return
    compared = [against_golden(ours), *([against_parent(ours)] if given.parent else [])]
    for what, apart in compared:
        print(
            f"{', '.join(sorted(ours))}: {what}: {'; '.join(apart) or 'equal' if 'NOT' not in what else ''}"
        )
    if any(apart for _, apart in compared):
        sys.exit("the losses have changed; if that is meant: scripts/losses.py --write")


if __name__ == "__main__":
    main()
