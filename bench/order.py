"""How far is shuffling by blocks from a full permutation, and what does it save the disk?

    python bench/order.py --out runs/order.json

For each (block, buffer) of lift_trainer.sampling.Shuffle, over epochs of N samples in shards of 5,000 and batches
of 16,384, the mean over batches from all parts of the epoch of

    partners    other samples of a batch that come from the same shard as a sample (what a shard of one topic,
                or of one film, would put beside it), and the largest number that any shard has in any batch
    duplicates  samples of a batch whose caption another one of it has, when each caption stands at five
                consecutive samples (five captions of one image, frames of a film): the worst arrangement; and
                when the same captions lie anywhere
    lag 1, lag b  correlation of the shard positions of samples that are 1, and one batch, apart in the order
    read        samples that are read in one go when the buffer is filled, and the share of a disk's sequential
                speed that this gives: 50 kB an image, 8 ms a seek, 150 MB/s (a hard disk); 30 ms and 100 MB/s (one
                connection to an object store)
    buffer      what waits in memory or in the local cache: samples × 50 kB

A full permutation is the last line. Everything is computed from the order alone; no data are read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import App

from lift_cache.errors import LiftError
from lift_cache.files import write_atomic
from lift_trainer.sampling import FULL, Sampler, Shuffle, permutation

SHARD = 5_000
REPEATS = 5
IMAGE_BYTES = 50_000
CHOICES = (
    Shuffle(4096, 16),
    Shuffle(4096, 64),
    Shuffle(1024, 64),
    Shuffle(1024, 256),
    Shuffle(256, 256),
    Shuffle(256, 1024),
    Shuffle(64, 4096),
    Shuffle(256, 4096),
    FULL,
)

app = App(help=__doc__, help_format="plaintext")


@app.default
def main(
    *, samples: int = 4_000_000, batch: int = 16_384, batches: int = 40, out: Path = Path("runs/order.json")
) -> None:
    """See the head of the file.

    Parameters
    ----------
    samples
        Size of the data set.
    batch
        Size of a batch.
    batches
        Batches measured, spread over the epoch.
    out
        Where the figures go.
    """
    dealt = permutation(samples, 1) // REPEATS
    rows = [measure(shuffle, samples, batch, batches, dealt) for shuffle in CHOICES]
    names = list(rows[0])
    table = "\n".join(
        "".join(f"{_text(value):>15}" for value in row) for row in [names, *(r.values() for r in rows)]
    )
    print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {"samples": samples, "batch": batch, "batches": batches, "shard": SHARD, "rows": rows}
    write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())


def measure(shuffle: Shuffle, samples: int, size: int, batches: int, dealt: np.ndarray) -> dict[str, Any]:
    sampler = Sampler(0, samples, size, shuffle)
    partners, most, together, apart, lag_1, lag_b = [], 0, [], [], [], []
    for step in np.linspace(0, sampler.steps_per_epoch - 2, batches, dtype=int).tolist():
        batch, after = sampler.batch(step), sampler.batch(step + 1)
        counts = np.bincount(batch // SHARD)
        partners.append(float((counts * (counts - 1)).sum() / size))
        most = max(most, int(counts.max()))
        together.append(repeated(batch // REPEATS))
        apart.append(repeated(dealt[batch]))
        lag_1.append(float(np.mean((batch[1:] / samples - 0.5) * (batch[:-1] / samples - 0.5)) * 12))
        lag_b.append(float(np.mean((batch / samples - 0.5) * (after / samples - 0.5)) * 12))
    full = samples <= shuffle.window
    run = 1 if full else shuffle.block
    return {
        "block": "full" if full else shuffle.block,
        "buffer": "" if full else shuffle.buffer,
        "partners": float(np.mean(partners)),
        "most": most,
        "dupl. beside": float(np.mean(together)),
        "dupl. anywhere": float(np.mean(apart)),
        "lag 1": float(np.mean(lag_1)),
        "lag b": float(np.mean(lag_b)),
        "read": run,
        "disk": speed(run, 0.008, 150e6),
        "store": speed(run, 0.030, 100e6),
        "buffer GB": 0.0 if full else shuffle.window * IMAGE_BYTES / 1e9,
    }


def repeated(captions: np.ndarray) -> float:
    """Share of a batch's samples whose caption another one of it has."""
    counts = np.unique(captions, return_counts=True)[1]
    return float(counts[counts > 1].sum() / len(captions))


def speed(run: int, seek: float, bytes_per_second: float) -> float:
    reading = run * IMAGE_BYTES / bytes_per_second
    return reading / (reading + seek)


def _text(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    try:
        app()
    except LiftError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
