"""What does a fixed text encoder save in a training step, and at which caption length?

    python bench/efficiency.py --out bench/results/efficiency.json

`lift` (ViT-B/16 at 224, an MLP head, texts from the cache) against `clip` (the same tower with a linear head
to 512, beside CLIP's text transformer of 12 layers and width 512, trained along), for captions of n tokens:

- FLOPs of a step (forward and backward) for one image, by PyTorch's counter on the meta device; and with
  the texts' embeddings in the bill, shared by 1 and by 10 runs of one epoch each. Embedding is a forward
  pass: 2 · parameters (without the token table) for each token, and attention.
- Peak memory on one device, counted over tensors that have a size and no content (`lift_trainer.flops`),
  with and without gradient checkpointing, and where the paper's figures hold.
- Peak resident memory and time of real steps, in small batches on the CPU, each kind in its own process.

The paper (arXiv 2506.04209) gives its savings "on average", for short and for long captions, where n is the
mean over batches of the longest caption's tokens. Which n that was is not known here (see `PAPER`), so the
question is put the other way round: at which n do the paper's figures hold?

Takes about 15 minutes on one core; `--quick` two.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin double the CPU time

import torch
from cyclopts import App
from torch import nn

from lift_cache.errors import LiftError
from lift_cache.files import write_atomic
from lift_trainer.config import TextShape
from lift_trainer.flops import (
    GIB,
    Flops,
    StepShape,
    TextTower,
    contrast_flops,
    image_flops,
    step_memory,
    text_flops,
)
from lift_trainer.losses import InfoNCE
from lift_trainer.optim import build_optimizer
from lift_trainer.text_towers import CachedTextTower, ClipTextTower
from lift_trainer.towers import ImageTower, build_tower

LENGTHS = (16, 32, 64, 77, 128, 192, 256, 323)
MEASURED = (16, 77, 323)
RUNS = (1, 10)
TOWER, SIDE = "vit_base_patch16_clip_224", 224
JOINT_DIMENSIONS = 512
MIB = 2**20
T = TypeVar("T")

PAPER_FLOPS = {"short captions": 0.255, "long captions": 0.357}
PAPER_MEMORY = {"short captions": 0.068, "long captions": 0.126}
PAPER = {
    "source": "arXiv 2506.04209, and the README of github.com/Jingfeng0705/LIFT",
    "flops": PAPER_FLOPS,
    "memory": PAPER_MEMORY,
    "n": "average per-batch maximum of the captions' tokens; which it is for either figure was not to be found",
    "text encoder of lift": "NV-Embed-v2 (7B, 4,096 dimensions), offline; taken to be outside the figures",
    "assumed for clip": "open_clip's text transformer beside ViT-B/16: 12 layers, width 512, 8 heads",
}


@dataclass(frozen=True)
class Encoder:
    """A language model that embeds captions; layers of grouped-query attention and a gated MLP."""

    layers: int
    width: int
    keys: int
    """Width of keys and values."""
    hidden: int

    @property
    def parameters(self) -> int:
        """In matrix products: without the token table, which is looked up, and without norms."""
        attention = 2 * self.width**2 + 2 * self.width * self.keys
        return self.layers * (attention + 3 * self.width * self.hidden)

    def flops(self, tokens: int) -> int:
        """Of embedding one caption: 2 for each parameter and token, and all tokens² products of attention."""
        return 2 * self.parameters * tokens + 4 * tokens**2 * self.width * self.layers


ENCODERS = {
    "SmolLM2-135M": Encoder(layers=30, width=576, keys=192, hidden=1536),
    # Mistral-7B, the body of NV-Embed-v2; its pooling layer, one attention over the tokens, is left out.
    "7B": Encoder(layers=32, width=4096, keys=1024, hidden=14_336),
}


class Arm(NamedTuple):
    """`lift` for captions of any length, or `clip` for those of `tokens`."""

    tokens: int | None
    dimensions: int

    @property
    def name(self) -> str:
        return "lift" if self.tokens is None else f"clip, n = {self.tokens}"

    def towers(self) -> tuple[ImageTower, TextTower]:
        if self.tokens is None:
            image = build_tower(TOWER, SIDE, "learned:0.5", self.dimensions)
            return image, CachedTextTower(self.dimensions, self.dimensions, "none")
        image = build_tower(TOWER, SIDE, "learned:0.5", JOINT_DIMENSIONS, head="linear", pooling="class")
        return image, ClipTextTower(JOINT_DIMENSIONS, TextShape(context=self.tokens))


app = App(help=__doc__, help_format="plaintext")


@app.default
def main(
    *,
    out: Path = Path("runs/efficiency.json"),
    dimensions: int = 4096,
    global_batch: int = 16_384,
    device_batch: int = 1_024,
    memory_batch: int = 16,
    time_batch: int = 8,
    rounds: int = 5,
    quick: bool = False,
) -> None:
    """Compare lift with clip; see the head of the file.

    Parameters
    ----------
    out
        Where the figures go; tables are printed, too.
    dimensions
        Width of the cached text vectors.
    global_batch
        Texts that every image is compared with.
    device_batch
        Images on each device, where memory is counted.
    memory_batch
        Images in the steps whose memory is measured.
    time_batch
        Images in the steps that are timed.
    rounds
        Timed steps of each kind, in turn.
    quick
        Fewer lengths, and real steps of two images: shows that everything works.
    """
    lengths, measured = (LENGTHS[::3], MEASURED[:1]) if quick else (LENGTHS, MEASURED)
    if quick:
        memory_batch, time_batch, rounds = 2, 2, 1
    counted = count(lengths, dimensions, global_batch)
    results: dict[str, Any] = {
        "setting": {
            "torch": torch.__version__,
            "tower": f"{TOWER} at {SIDE}",
            "dimensions": {"lift": dimensions, "clip": JOINT_DIMENSIONS},
            "global_batch": global_batch,
            "device_batch": device_batch,
            "precision": "bf16 autocast, AdamW",
        },
        "paper": PAPER,
        "encoders": {name: asdict(e) | {"parameters": e.parameters} for name, e in ENCODERS.items()},
        "flops": counted,
    }
    print(flops_table(counted))
    results["memory"] = [
        memory(lengths, dimensions, device_batch, global_batch, recompute) for recompute in (False, True)
    ]
    for table in results["memory"]:
        print(memory_table(table))
    results["measured"] = measure(measured, dimensions, memory_batch, time_batch, rounds)
    print(measured_table(results["measured"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, (json.dumps(results, indent=1) + "\n").encode())
    print(f"written to {out}")


# ---------------------------------------------------------------------------------------------------- count


def step_flops(arm: Arm, global_batch: int) -> Flops:
    """Of one image and its caption."""
    with torch.device("meta"):
        image, text = arm.towers()
    contrast = contrast_flops(global_batch, text.dimensions, texts_train=text.trains)
    return image_flops(image, SIDE) + text_flops(text) + contrast


def count(lengths: tuple[int, ...], dimensions: int, global_batch: int) -> dict[str, Any]:
    lift = step_flops(Arm(None, dimensions), global_batch).step

    def saving(tokens: int) -> float:
        return 1 - lift / step_flops(Arm(tokens, dimensions), global_batch).step

    rows = []
    for n in lengths:
        clip = step_flops(Arm(n, dimensions), global_batch).step
        embedded: dict[str, Any] = {}
        for name, encoder in ENCODERS.items():
            once = encoder.flops(n)
            embedded[name] = {
                "embedding": once,
                "saving": {str(runs): 1 - (lift + once / runs) / clip for runs in RUNS},
                "passes_until_it_pays": once / (clip - lift),
            }
        rows.append({"n": n, "clip": clip, "saving": 1 - lift / clip, "with_embedding": embedded})
    return {
        "unit": "FLOPs of forward and backward for one image and its caption",
        "lift": lift,
        "lengths": rows,
        "paper_holds_at_n": {name: first(saving, share, rows) for name, share in PAPER_FLOPS.items()},
    }


def memory(
    lengths: tuple[int, ...], dimensions: int, device_batch: int, global_batch: int, recompute: bool
) -> dict[str, Any]:
    shape = StepShape(device_batch, SIDE, others=global_batch - device_batch)

    def peak(arm: Arm) -> int:
        with torch.device("meta"):
            image, text = arm.towers()
        if recompute:
            image.checkpoint_gradients()
            if isinstance(text, ClipTextTower):
                text.checkpoint_gradients()
        return step_memory(image, [text], shape).peak

    lift = peak(Arm(None, dimensions))

    def saving(tokens: int) -> float:
        return 1 - lift / peak(Arm(tokens, dimensions))

    rows = [{"n": n, "clip": (clip := peak(Arm(n, dimensions))), "saving": 1 - lift / clip} for n in lengths]
    return {
        "unit": "bytes at the peak of a step on one device",
        "gradient_checkpointing": recompute,
        "lift": lift,
        "lengths": rows,
        "paper_holds_at_n": {name: first(saving, share, rows) for name, share in PAPER_MEMORY.items()},
    }


def first(saving: Callable[[int], float], share: float, rows: list[dict[str, Any]]) -> int | None:
    """The smallest n with at least this saving, which grows with n; None beyond the longest of the rows."""
    below = [row["n"] for row in rows if row["saving"] < share]
    above = [row["n"] for row in rows if row["saving"] >= share]
    if not above:
        return None
    low, high = max(below, default=2) + 1, min(above)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if saving(middle) >= share else (middle + 1, high)
    return low


# -------------------------------------------------------------------------------------------------- measure


def measure(
    lengths: tuple[int, ...], dimensions: int, memory_batch: int, time_batch: int, rounds: int
) -> dict[str, Any]:
    arms = [Arm(None, dimensions), *(Arm(n, dimensions) for n in lengths)]
    peaks = {}
    for arm in arms:
        # Blocks beyond this size go back to the system at once, so that what is resident is what is used.
        with environment(MALLOC_MMAP_THRESHOLD_=str(MIB // 4)):
            peaks[arm] = apart(partial(peak_of_steps, arm, memory_batch))
    seconds = apart(partial(timed_steps, arms, time_batch, rounds))
    rows = []
    for arm in arms:
        with torch.device("meta"):
            image, text = arm.towers()
        estimate = step_memory(image, [text], StepShape(memory_batch, SIDE)).peak
        ratios = [lift / own for lift, own in zip(seconds[arms[0]], seconds[arm], strict=True)]
        rows.append(
            {
                "arm": arm.name,
                "n": arm.tokens,
                "peak": peaks[arm],
                "estimated_peak": estimate,
                "memory_saving": 1 - peaks[arms[0]] / peaks[arm],
                "seconds": statistics.median(seconds[arm]),
                "all_seconds": [round(s, 3) for s in seconds[arm]],
                "time_saving": 1 - statistics.median(ratios),
            }
        )
    return {
        "memory_batch": memory_batch,
        "time_batch": time_batch,
        "threads": torch.get_num_threads(),
        "arms": rows,
    }


def apart(work: Callable[[], T]) -> T:
    """The result of some work in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work).result()


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """For processes started within."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Trainer:
    """Steps of one arm on random images and texts."""

    def __init__(self, arm: Arm, batch: int) -> None:
        torch.manual_seed(0)
        self.image, self.text = arm.towers()
        self.loss = InfoNCE()
        self.model = nn.ModuleList([self.image, self.text, self.loss])
        self.optimizer = build_optimizer(self.model, 1e-4, 0.2)
        self.pixels = torch.randint(0, 256, (batch, 3, SIDE, SIDE), dtype=torch.uint8)
        if arm.tokens is None:
            self.texts = nn.functional.normalize(torch.randn(batch, arm.dimensions), dim=1)
        else:
            self.texts = torch.randint(1, 49_000, (batch, arm.tokens))
        self.captions = torch.arange(batch)

    def step(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            x_bd, y_bd = self.image(self.pixels), self.text(self.texts)
        self.loss(x_bd, y_bd, self.captions).loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def peak_of_steps(arm: Arm, batch: int) -> int:
    """Bytes that two steps keep resident at their peak, beyond what Python and its libraries take."""
    with torch.autocast("cpu", torch.bfloat16):
        nn.Linear(8, 8)(torch.zeros(8, 8)).sum().backward()  # libraries load what they need on first use
    before = _resident("VmRSS")
    trainer = Trainer(arm, batch)
    for _ in range(2):
        trainer.step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LiftError(f"/proc/self/status has no {field}: memory can be measured on Linux only")


def timed_steps(arms: list[Arm], batch: int, rounds: int) -> dict[Arm, list[float]]:
    """Seconds of steps of each arm, in turn, after one that is not counted."""
    trainers = {arm: Trainer(arm, batch) for arm in arms}
    seconds: dict[Arm, list[float]] = {arm: [] for arm in arms}
    for turn in range(rounds + 1):
        for arm, trainer in trainers.items():
            began = time.perf_counter()
            trainer.step()
            if turn:
                seconds[arm].append(time.perf_counter() - began)
    return seconds


# --------------------------------------------------------------------------------------------------- tables


def flops_table(counted: dict[str, Any]) -> str:
    names = list(ENCODERS)
    head = ["n", "clip, GFLOPs", "saved"]
    for name in names:
        head += [f"{name}, {runs} run{'s' * (runs > 1)}" for runs in RUNS] + [f"{name}: pays after passes"]
    rows = []
    for row in counted["lengths"]:
        cells = [str(row["n"]), f"{row['clip'] / 1e9:.1f}", f"{row['saving']:.1%}"]
        for name in names:
            with_it = row["with_embedding"][name]
            cells += [f"{with_it['saving'][str(runs)]:.1%}" for runs in RUNS]
            cells.append(f"{with_it['passes_until_it_pays']:.1f}")
        rows.append(cells)
    title = f"\nFLOPs of a step for one image; lift {counted['lift'] / 1e9:.1f} GFLOPs"
    return f"{title}\n\n{table(head, rows)}\n\n{holds(counted, PAPER_FLOPS)}"


def memory_table(counted: dict[str, Any]) -> str:
    rows = [[str(row["n"]), f"{row['clip'] / GIB:.1f}", f"{row['saving']:.1%}"] for row in counted["lengths"]]
    how = "with" if counted["gradient_checkpointing"] else "without"
    title = f"\nPeak memory, {how} gradient checkpointing; lift {counted['lift'] / GIB:.1f} GiB"
    return f"{title}\n\n{table(['n', 'clip, GiB', 'saved'], rows)}\n\n{holds(counted, PAPER_MEMORY)}"


def measured_table(measured: dict[str, Any]) -> str:
    rows = [
        [
            row["arm"],
            f"{row['peak'] / GIB:.2f}",
            f"{row['estimated_peak'] / GIB:.2f}",
            f"{row['memory_saving']:.1%}",
            f"{row['seconds']:.2f}",
            f"{row['time_saving']:.1%}",
        ]
        for row in measured["arms"]
    ]
    head = ["", "peak, GiB", "estimated", "saved", "seconds a step", "saved"]
    title = (
        f"\nMeasured on the CPU, {measured['threads']} thread(s): memory with {measured['memory_batch']} images, "
        f"time with {measured['time_batch']}"
    )
    return f"{title}\n\n{table(head, rows)}\n"


def holds(counted: dict[str, Any], paper: dict[str, float]) -> str:
    found = counted["paper_holds_at_n"]
    return "; ".join(
        f"the paper's {share:.1%} for {name} holds " + (f"at n = {found[name]}" if found[name] else "nowhere")
        for name, share in paper.items()
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    try:
        app()
    except LiftError as error:
        sys.exit(f"error: {error}")
