"""What text from the cache costs a training step, how fast the loader is, and what a text tower would cost.

    python bench/trainer.py --out bench/results/trainer.json
    python bench/trainer.py --only loader --quick

Ratios are medians over pairs that were measured in turn, the order within a pair changing, with the quartiles of the
pairs' own ratios. Photos, captions and vectors are generated (the same ones every time) and deleted at the end; they
take 2 GB. What is read stays in the page cache: bench/cache.py has what a disk costs.

    text    a step whose text vectors come from a cache, against the same step with them as one tensor in memory:
            100,000 captions, no worker processes, so that nothing hides the reading behind the step. `gather` is
            the part of the step in which the two differ, timed by itself; `whole step` compares the steps. At 64
            pixels the images are stored small: decoding photographs would hide the text
    loader  images/s of `Batches.stream` (which also gathers vectors of width 4,096) against WebDataset and
            torchvision's RandomResizedCrop over the same tars (which also reads the caption), to uint8 pixels; the
            crop of a PIL image and that of a tensor (pip install webdataset==1.0.2 braceexpand==0.1.7; they are no
            requirement of anything else)
    joint   a step of the preset lift over one of the preset clip with the batch at hand: ViT-Ti/16 at 224 beside a
            text tower of a quarter of the preset's width (bench/efficiency.py has ViT-B/16 and the preset's own)
"""

from __future__ import annotations

import gc
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin double the CPU time

import numpy as np
import torch
import yaml
from cyclopts import App, Parameter
from PIL import Image
from reporting import Record, Spread, machine, markdown, rounded
from torch import nn
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode, v2

from lift_cache.bulk import BulkWriter
from lift_cache.errors import BadConfig, LiftError
from lift_cache.files import make_directory, write_atomic
from lift_cache.recipe import Recipe
from lift_trainer.batches import Batch, Batches
from lift_trainer.commands import presets
from lift_trainer.config import TrainConfig
from lift_trainer.images import ImageStore
from lift_trainer.job import Job, prepare
from lift_trainer.loop import backward_of
from lift_trainer.model import Inputs
from lift_trainer.optim import build_optimizer
from lift_trainer.text import TextVectors

Part = Callable[[Path, bool], Iterator[Record]]
Pixels = Generator[torch.Tensor, None, None]
T = TypeVar("T")

CPU = torch.device("cpu")
SHARDS = 8
MANY_STEPS = 1_000_000

app = App(help=__doc__, help_format="plaintext")


# Data


@dataclass(frozen=True)
class Data:
    """Shards of generated photographs, and caches of generated vectors of their captions."""

    folder: Path
    samples: int
    width: int
    height: int
    captions: int
    """Of each sample."""

    @property
    def shards(self) -> list[str]:
        return [str(self.folder / f"photos-{number:03d}.tar") for number in range(SHARDS)]

    def cache(self, dimensions: int) -> str:
        return str(self.folder / f"cache-{dimensions}")

    def write(self, *dimensions: int) -> Data:
        """The shards, and a cache of each of some widths."""
        self.folder.mkdir()
        for number, path in enumerate(self.shards):
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for sample in range(number, self.samples, SHARDS):
                    record = json.dumps({"captions": self._captions(sample)}).encode()
                    jpeg = photograph(sample, self.width, self.height)
                    for name, data in ((f"{sample:06d}.jpg", jpeg), (f"{sample:06d}.json", record)):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        for width in dimensions:
            with BulkWriter(self.cache(width), recipe(width)) as writer:
                for start in range(0, self.samples, 100):
                    samples = range(start, min(start + 100, self.samples))
                    texts = [caption for sample in samples for caption in self._captions(sample)]
                    random = np.random.default_rng(start)
                    writer.add(texts, random.standard_normal((len(texts), width), np.float32) / width**0.5)
                writer.finish()
        return self

    def _captions(self, sample: int) -> list[str]:
        return [f"photograph {sample}, seen from the left, in words number {n}" for n in range(self.captions)]


def photograph(number: int, width: int, height: int) -> bytes:
    """A JPEG of smooth noise: of 500 × 375 pixels about 45 kB, as photographs of that size."""
    random = np.random.default_rng(number)
    canvas = _canvas(number % 4, width, height)
    top, left = (int(random.integers(0, 3 * side)) for side in (height, width))
    file = io.BytesIO()
    Image.fromarray(canvas[top : top + height, left : left + width]).save(file, "JPEG", quality=90)
    return file.getvalue()


@lru_cache(maxsize=4)
def _canvas(number: int, width: int, height: int) -> np.ndarray:
    """What photographs are cut from: uint8 [4 · height, 4 · width, 3], finer structure being fainter."""
    random = torch.Generator().manual_seed(number)
    size, amplitude = (4 * height, 4 * width), 50.0
    grey_and_colour = torch.zeros(1, 3, *size)
    cells = 8
    while cells < max(size):
        noise = torch.randn(1, 3, cells * 3 // 4, cells, generator=random)
        noise = noise[:, :1] + noise * 0.3
        grey_and_colour += amplitude * interpolate(noise, size, mode="bicubic")
        cells, amplitude = cells * 2, amplitude * 0.7
    return (grey_and_colour[0] + 128).clamp(0, 255).byte().permute(1, 2, 0).numpy()


def recipe(dimensions: int) -> Recipe:
    return Recipe(
        model="bench/none",
        revision="0" * 40,
        dtype="float32",
        tokenizer_revision="0" * 40,
        end_token=True,
        pooling="last",
        max_tokens=77,
        normalize=True,
        dimensions=dimensions,
        declared=True,
    )


# A run


def job_of(data: Data, preset: str, **settings: Any) -> Job:
    """A run of a preset, on the CPU, that reads and decodes every image in this process."""
    config = yaml.safe_load(presets()[preset].read_text()) | {
        "data": data.shards,
        "run": data.folder / "run",
        "steps": MANY_STEPS,
        "device": "cpu",
    }
    return prepare(TrainConfig.model_validate(config | settings))


def batches_of(job: Job, text: TextVectors | None = None) -> Batches:
    return Batches(
        ImageStore(job.index, job.config.max_pixels),
        (text,) if text else job.texts,
        job.sampler,
        job.config.seed,
        job.config.image_size,
        job.config.max_bad,
        captions=job.captions,
    )


class Training:
    """A model and the step of `lift_trainer.loop`."""

    def __init__(self, job: Job) -> None:
        self.job, self.model, config = job, job.model, job.config
        self.model.train()
        self.optimizer = build_optimizer(
            self.model,
            config.lr / 100,  # hundreds of steps on noise: the loss is to stay a number
            config.weight_decay,
            name=config.optimizer,
            betas=config.betas,
            eps=config.eps,
            spared=config.spared,
        )
        self._backward = backward_of(config, self.model)

    def step(self, batch: Batch) -> None:
        value = self._backward(Inputs.of(batch, self.job.transforms))
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.job.config.clip).item()
        assert np.isfinite(norm) and np.isfinite(value.loss.item())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.loss.clamp_()


@dataclass(frozen=True)
class InMemory:
    """Text vectors as one tensor."""

    vectors: torch.Tensor
    """float16 [u, D]."""
    resolution: float

    @property
    def dimensions(self) -> int:
        return self.vectors.shape[1]

    def gather(self, captions: np.ndarray) -> np.ndarray:
        return self.vectors[torch.from_numpy(captions)].numpy()


class Timed:
    """Text vectors, and how long they took to gather."""

    def __init__(self, inner: TextVectors) -> None:
        self.inner, self.seconds = inner, 0.0
        self.dimensions, self.resolution = inner.dimensions, inner.resolution

    def gather(self, captions: np.ndarray) -> np.ndarray:
        taken, vectors = clocked(lambda: self.inner.gather(captions))
        self.seconds += taken
        return vectors


# Measuring


def clocked(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds, and what came out."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def in_turn(arms: Sequence[Callable[[int], T]], budget: float, least: int = 4) -> list[list[T]]:
    """What each arm gives, round by round, in changing order, for so many seconds and at least so many rounds."""
    results: list[list[T]] = [[] for _ in arms]
    began, number = time.perf_counter(), 0
    while number < least or time.perf_counter() - began < budget:
        order = list(range(len(arms)))
        for which in order if number % 2 else reversed(order):
            results[which].append(arms[which](number))
        number += 1
    return results


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


# The parts


SMALL = "vit:width=128,depth=4,heads=4,patch=8"


def text(work: Path, quick: bool) -> Iterator[Record]:
    samples = 200 if quick else 2_000
    for tower, side, batch, size, asked in (
        ("vit_tiny_patch16_224", 224, 32, (500, 375), 0.01),
        (SMALL, 64, 256, (96, 72), 0.03),
    ):
        data = Data(work / f"data-{side}", samples, *size, captions=50).write(4096, 384)
        for dimensions in (4096, 384):
            job = job_of(
                data,
                "lift",
                cache=[data.cache(dimensions)],
                tower=tower,
                image_size=side,
                batch_size=8 if quick else batch,
            )
            about = {"tower": tower, "image": side, "width": dimensions, "captions": len(job.index.captions)}
            yield about | {"batch": job.config.batch_size} | _text(job, 1 if quick else 45) | {"asked": asked}


def _text(job: Job, budget: float) -> Record:
    stored = job.texts[0]
    every = torch.from_numpy(stored.gather(np.arange(len(job.index.captions))))
    training = Training(job)
    texts = [Timed(stored), Timed(InMemory(every, stored.resolution))]
    streams = [batches_of(job, text).stream(0, MANY_STEPS, 0, CPU) for text in texts]
    seen: list[torch.Tensor] = []

    def arm(which: int) -> Callable[[int], tuple[float, float]]:
        def one(number: int) -> tuple[float, float]:
            before, began = texts[which].seconds, time.perf_counter()
            batch = next(streams[which])
            training.step(batch)
            taken = time.perf_counter() - began
            seen.append(batch.texts[0])
            if len(seen) == 2:
                assert torch.equal(*seen)
                seen.clear()
            return taken, texts[which].seconds - before

        return one

    arms = [arm(0), arm(1)]
    in_turn(arms, 0, least=2)  # first steps allocate
    cached, memory = in_turn(arms, budget, least=6)
    steps = [[step for step, _ in side] for side in (cached, memory)]
    gathers = [[gather for _, gather in side] for side in (cached, memory)]
    whole = Spread.of([ratio - 1 for ratio in ratios(*steps)])
    share = Spread.of([(a - b) / step for a, b, step in zip(*gathers, steps[1], strict=True)])
    return {
        "pairs": len(cached),
        "step s": statistics.median(steps[1]),
        "gather ms": statistics.median(gathers[0]) * 1e3,
        "tensor ms": statistics.median(gathers[1]) * 1e3,
        "gather, share of the step": share.median,
        "its quartiles": share.quartiles,
        "whole step, more": whole.median,
        "quartiles": whole.quartiles,
    }


CROP = v2.RandomResizedCrop(224, scale=(0.9, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True)
PLAIN = {
    "crop of PIL": v2.Compose([CROP, v2.PILToTensor()]),
    "crop of a tensor": v2.Compose([v2.PILToTensor(), CROP]),
}


def loader(work: Path, quick: bool) -> Iterator[Record]:
    try:
        import webdataset
    except ImportError:
        yield {"note": "left out: pip install webdataset==1.0.2 braceexpand==0.1.7"}
        return
    data = Data(work / "data", 200 if quick else 1_000, 500, 375, captions=5).write(4096)
    size = 16 if quick else 128
    ours = batches_of(
        job_of(data, "lift", cache=[data.cache(4096)], tower="vit_tiny_patch16_224", batch_size=size)
    )

    def plain(transform: Callable[[Any], Any], workers: int) -> Pixels:
        dataset = (
            webdataset.WebDataset(data.shards, resampled=True, shardshuffle=False)
            .shuffle(1000)
            .decode("pil")
            .to_tuple("jpg", "json")
            .map_tuple(transform, _first_caption)
            .batched(size)
        )
        for pixels, _ in webdataset.WebLoader(dataset, batch_size=None, num_workers=workers):
            yield pixels

    def arm(workers: int, transform: Callable[[Any], Any] | None) -> Callable[[int], float]:
        def one(number: int) -> float:
            """Images/s, once every worker has brought a batch."""
            at_once, rounds = max(workers, 1), 2 if quick else 5
            stream: Pixels
            if transform is None:
                start = number * 100
                stream = (batch.pixels for batch in ours.stream(start, start + 100, workers, CPU))
            else:
                stream = plain(transform, workers)
            gc.collect()
            for _ in range(at_once):
                assert next(stream).shape == (size, 3, 224, 224)
            taken, _ = clocked(lambda: [next(stream) for _ in range(rounds * at_once)])
            stream.close()
            return rounds * at_once * size / taken

        return one

    for workers in (0, 1, 2):
        arms = [arm(workers, None), *(arm(workers, transform) for transform in PLAIN.values())]
        speeds = in_turn(arms, 1 if quick else 55)
        for name, speed in zip(PLAIN, speeds[1:], strict=True):
            ratio = Spread.of(ratios(speeds[0], speed))
            yield {
                "workers": workers,
                "against": f"webdataset {webdataset.__version__}, {name}",
                "batch": size,
                "rounds": len(speed),
                "ours, images/s": statistics.median(speeds[0]),
                "plain, images/s": statistics.median(speed),
                "ratio": ratio.median,
                "quartiles": ratio.quartiles,
                "asked": 1.0,
            }


def _first_caption(record: dict[str, list[str]]) -> str:
    return record["captions"][0]


def joint(work: Path, quick: bool) -> Iterator[Record]:
    data = Data(work / "data", 100, 500, 375, captions=5).write(4096, 384)
    common = {"tower": "vit_tiny_patch16_224", "batch_size": 4 if quick else 32}
    # A quarter of the preset's width, as the image tower's 192 is of ViT-B/16's 768.
    shape = "context=77,width=128,depth=12,heads=2"
    clip = Training(job_of(data, "clip", **common, dimensions=128, text_shape=shape))
    for dimensions in (4096, 384):
        lift = Training(job_of(data, "lift", **common, cache=[data.cache(dimensions)]))
        of_lift, of_clip = (next(batches_of(training.job).stream(0, 1, 0, CPU)) for training in (lift, clip))
        assert torch.equal(of_lift.pixels, of_clip.pixels)

        def arm(training: Training, batch: Batch) -> Callable[[int], float]:
            return lambda number: clocked(lambda: training.step(batch))[0]

        arms = [arm(lift, of_lift), arm(clip, of_clip)]
        in_turn(arms, 0, least=1)  # first steps allocate
        steps = in_turn(arms, 1 if quick else 45, least=5)
        ratio = Spread.of(ratios(*steps))
        yield {
            "tower": common["tower"],
            "text tower of clip": shape,
            "width of lift": dimensions,
            "batch": common["batch_size"],
            "pairs": len(steps[0]),
            "lift, parameters": _trained(lift),
            "clip, parameters": _trained(clip),
            "lift s": statistics.median(steps[0]),
            "clip s": statistics.median(steps[1]),
            "lift over clip": ratio.median,
            "quartiles": ratio.quartiles,
        }


def _trained(training: Training) -> int:
    return sum(p.numel() for p in training.model.parameters() if p.requires_grad)


PARTS: dict[str, Part] = {"text": text, "loader": loader, "joint": joint}


@app.default
def main(
    *,
    out: Path | None = None,
    only: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = tuple(PARTS),
    quick: Annotated[bool, Parameter(negative=())] = False,
    work: Path | None = None,
) -> None:
    """Measure the trainer; see the head of the file.

    Parameters
    ----------
    out
        Where the numbers go, as JSON. Parts that are not run stay as they are there.
    only
        Parts to run. Default: all.
    quick
        Small and few: whether it runs at all, not how fast.
    work
        A directory for the data. Default: a new one where temporary files go.
    """
    unknown = [name for name in only if name not in PARTS]
    if unknown:
        raise BadConfig(f"--only {unknown[0]}: no such part; there are {', '.join(PARTS)}")
    parts: dict[str, Record] = {}
    if out is not None:
        make_directory(out.parent)
        parts = json.loads(out.read_text())["parts"] if out.exists() else {}
    with tempfile.TemporaryDirectory(dir=work, prefix="bench-trainer-") as scratch:
        os.environ["LIFT_INDEX_DIR"] = f"{scratch}/index"
        for name in only:
            place = Path(scratch) / name
            place.mkdir()
            before, records = os.getloadavg()[0], []
            began = time.perf_counter()
            for record in PARTS[name](place, quick):
                records.append(record)
                print(name, json.dumps(rounded(record)), flush=True)
            parts[name] = {
                "machine": machine("torch", "torchvision", "pillow", "webdataset"),
                "threads": torch.get_num_threads(),
                "quick": quick,
                "load": [before, os.getloadavg()[0]],
                "seconds": round(time.perf_counter() - began, 1),
                "rows": records,
            }
            if out is not None:
                report = {"parts": {part: parts[part] for part in PARTS if part in parts}}
                write_atomic(out, (json.dumps(report, indent=1) + "\n").encode())
    print()
    print(markdown({name: parts[name]["rows"] for name in only}))


if __name__ == "__main__":
    try:
        app()
    except LiftError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
