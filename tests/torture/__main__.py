"""Torture: what the cache promises, tried at every point, counted and printed.

    python tests/torture --budget 300          every part, sharing five minutes
    python tests/torture --full                the counts that docs/cache.md states
    python tests/torture --only kill,damage --seed 7

Exit status 1 on any violation.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from random import Random

import damage
import disks
import kill
import machine
import powerloss
import pyarrow.compute  # noqa: F401  children start with what they would import anyway
import shim
from children import alone, must
from tally import Tally, table
from workloads import Materials

PARTS = {
    "powerloss": (powerloss.run, 0.45),
    "kill": (kill.run, 0.2),
    "damage": (damage.run, 0.13),
    "disks": (disks.run, 0.12),
    "machine": (machine.run, 0.1),
}
"""Part → what runs it, and its share of the time."""


def main() -> int:
    parser = argparse.ArgumentParser(
        "torture", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=300, help="seconds for all parts together")
    parser.add_argument("--full", action="store_true", help="whatever time it takes")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    chosen = asked.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")

    memory = Path("/dev/shm")
    scratch = Path(
        os.environ.get("TORTURE_SCRATCH")
        or tempfile.mkdtemp("-torture", dir=memory if memory.is_dir() else None)
    )
    shim.preload(scratch)
    gc.freeze()
    tallies = []
    try:
        materials = Materials(scratch / "materials")
        must(alone(materials.make))
        whole = sum(PARTS[part][1] for part in chosen)
        for part in chosen:
            run, share = PARTS[part]
            tally = Tally(part)
            tallies.append(tally)
            until = time.monotonic() + asked.budget * share / whole
            chance = Random(f"{part} {asked.seed}")
            run(tally, materials, scratch, chance, until=until, full=asked.full)
            tally.say()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"\n{table(tallies)}")
    return 1 if any(tally.violations for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
