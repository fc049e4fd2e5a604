"""What does a sample index cost: to make, to open, on disk and in memory?

    python bench/index.py --out runs/index.json

Reading: tars of 10,000 samples (a 400-byte image, a JSON with a caption of 14 words) that are written first, read
once by `build_index` and then opened again. Joining: as many parts as make up N samples, written as reading would
have left them, joined to one index and opened again; only so can 10⁷ samples be measured without their images.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import App

import lift_trainer.samples as samples_module
from lift_cache.errors import LiftError
from lift_cache.files import write_atomic
from lift_cache.keys import KEY_BYTES
from lift_trainer.index_file import IndexDirectory, binary
from lift_trainer.rejects import Rejects
from lift_trainer.samples import Index, build_index
from lift_trainer.scan import Part

SHARD = 10_000
WORDS = 14

app = App(help=__doc__, help_format="plaintext")


@app.default
def main(
    *,
    read: int = 100_000,
    join: int = 10_000_000,
    work: Path = Path("runs/bench-index"),
    out: Path = Path("runs/index.json"),
) -> None:
    """See the head of the file.

    Parameters
    ----------
    read
        Samples to read from tars.
    join
        Samples to join.
    work
        A directory for what is written; it is deleted at the end.
    out
        Where the figures go.
    """
    shutil.rmtree(work, ignore_errors=True)
    try:
        result = {"read": measure_reading(work / "read", read), "join": measure_joining(work / "join", join)}
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(result, indent=1))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())


def measure_reading(work: Path, samples: int) -> dict[str, Any]:
    shards = [write_shard(work / f"train-{n:05d}.tar", n) for n in range(samples // SHARD)]
    return measure(work, shards, samples)


def measure_joining(work: Path, samples: int) -> dict[str, Any]:
    shards = []
    for number in range(samples // SHARD):
        shards.append(work / f"train-{number:05d}.tar")
        shards[-1].parent.mkdir(parents=True, exist_ok=True)
        shards[-1].touch()
        settle(shards[-1])
    os.environ["LIFT_INDEX_DIR"] = str(work / "index")
    sources = samples_module._sources([str(shard) for shard in shards], None)
    building = samples_module._Building(sources, samples_module.Fields(), Rejects(0))
    directory = IndexDirectory(work / "index")
    (work / "index" / "parts").mkdir(parents=True)
    for number in range(len(shards)):
        identity, mark = building.identities[number], building.marks[number]
        directory.write_part(identity, mark, made_up(number).columns(), {"source": "", "left_out": []})
    return measure(work, shards, samples)


def measure(work: Path, shards: list[Path], samples: int) -> dict[str, Any]:
    os.environ["LIFT_INDEX_DIR"] = str(work / "index")
    samples_module.WORTH_KEEPING = 0
    names, results = [str(shard) for shard in shards], {}
    before = peak_mib()
    for what in ("made", "opened"):
        began, cpu = time.perf_counter(), time.process_time()
        index: Index = build_index(names, Rejects(0))
        results[what] = {
            "wall_s": round(time.perf_counter() - began, 3),
            "cpu_s_per_million": round((time.process_time() - cpu) / samples * 1e6, 3),
        }
        assert len(index) == samples and index.digest
    files = sum(path.stat().st_size for path in (work / "index").rglob("*.arrow"))
    whole = sum(path.stat().st_size for path in (work / "index").glob("*.arrow"))
    return {
        "samples": samples,
        **results,
        "bytes_per_sample": round(files / samples, 1),
        "of_these_mapped_while_training": round(whole / samples, 1),
        "peak_mib_before": before,
        "peak_mib": peak_mib(),
    }


def write_shard(path: Path, number: int) -> Path:
    draw = random.Random(number)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for sample in range(SHARD):
            record = json.dumps({"caption": " ".join(f"word{draw.randrange(5000)}" for _ in range(WORDS))})
            for ext, data in (("jpg", bytes(400)), ("json", record.encode())):
                info = tarfile.TarInfo(f"{number:05d}{sample:06d}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    settle(path)
    return path


def settle(path: Path) -> None:
    """A file changed a moment ago would not be kept."""
    os.utime(path, (time.time() - 60, time.time() - 60))


def made_up(number: int) -> Part:
    """A part of SHARD samples with names of 11 and captions of 100 bytes."""
    names = "".join(f"{number:05d}{sample:06d}" for sample in range(SHARD)).encode()
    draw = np.random.default_rng(number)
    return Part(
        names=binary(names, np.arange(1, SHARD + 1) * 11),
        offset=np.arange(SHARD) * 50_000,
        size=np.full(SHARD, 48_000),
        first=np.arange(SHARD + 1),
        pairs=np.arange(SHARD),
        captions=binary(
            draw.integers(97, 123, SHARD * 100, np.uint8).tobytes(), np.arange(1, SHARD + 1) * 100
        ),
        keys=draw.integers(0, 256, (SHARD, KEY_BYTES), np.uint8),
        fields=np.zeros(SHARD, np.uint8),
    )


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    try:
        app()
    except LiftError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
