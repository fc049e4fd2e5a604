"""What a run will do, said before it does it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from lift_trainer.batches import Batches
from lift_trainer.config import TextShape
from lift_trainer.distributed import world_size
from lift_trainer.flops import StepShape, plan_step
from lift_trainer.images import ImageStore
from lift_trainer.job import Job
from lift_trainer.launch import agreed
from lift_trainer.loop import backward_of, worker_count
from lift_trainer.model import Inputs
from lift_trainer.sampling import Sampler

T = TypeVar("T")

MEASURED, MEASURED_ON_GPU = 16, 256
"""Images of a step that is measured."""
SECONDS, REPEATS = 3.0, 10
"""Of a measurement, at most."""


def plan(job: Job) -> str:
    """What is settled, in six lines."""
    config, index, schedule = job.config, job.index, job.schedule
    left_out = f", {len(job.rejects.named)} left out" if job.rejects.named else ""
    epochs = schedule.total / job.sampler.steps_per_epoch
    trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    kept = sum(p.numel() for p in job.model.parameters()) - trained
    frozen = f" and {kept:,} kept" if config.start == "frozen" else ""
    start = "" if config.start == "scratch" else f" ({config.start})"
    return "\n".join(
        [
            f"data      {len(index):,} images, {len(index.pairs):,} captions, "
            f"{len(index.captions):,} distinct{left_out}",
            f"text      {_text(job)}",
            f"tower     {config.tower}{start} at {config.image_size}, head {config.head}, position embedding "
            f"{config.pos_embed}, {trained:,} parameters trained{frozen}",
            f"schedule  {schedule.total:,} steps of {config.batch_size:,} images ({epochs:.3g} epochs), "
            f"{config.loss}, mask {config.mask}, {config.optimizer}, learning rate {schedule.peak:.3g}, "
            f"warm-up {schedule.warmup:,} steps",
            f"device    {job.device}, {config.precision}",
            f"run       {f'continues {config.run} at step {job.start:,}' if job.start else config.run}",
        ]
    )


def _text(job: Job) -> str:
    config = job.config
    if config.text_tower == "clip":
        unused = "; --cache is not used" if config.cache else ""
        return f"CLIP's text transformer, trained ({config.text_shape}){unused}"
    said = []
    for text, origin in zip(job.texts, job.origins, strict=True):
        name = origin.recipe.model if origin.recipe else "hashed word n-grams"
        if origin.snapshot:
            name += f", snapshot {origin.snapshot}"
        if origin.control == "permuted":
            name += ", dealt to the wrong captions"
        said.append(f"{name}, {text.dimensions} dimensions")
    head = "" if config.text_head == "none" else f", head {config.text_head}"
    return f"{'; '.join(said)}, transform {config.text_transform}{head}"


def cost(job: Job) -> str:
    """What it will cost: FLOPs and memory by count, time by a few steps that are thrown away."""
    config, ranks = job.config, world_size()
    share = config.batch_size // ranks
    shape = StepShape(
        batch=min(share, config.gradient_cache or share),
        image_size=config.image_size,
        captions=job.captions.width(job.index.most_captions),
        others=(config.batch_size - share) * len(job.model.texts) + config.text_negatives,
        features=config.keep_features,
    )
    step = plan_step(
        job.model.tower,
        list(job.model.texts),  # type: ignore[arg-type]
        shape,
        precision=config.precision,
        optimizer=config.optimizer,
        joint=TextShape.parse(config.text_shape),
    )
    left = (job.schedule.total - job.start) * config.batch_size
    return "\n".join([*step.lines(), _time(job, left)])


def _time(job: Job, images: int) -> str:
    config, workers = job.config, worker_count(job.config, False, job.device)
    some = min(config.batch_size // world_size(), MEASURED_ON_GPU if job.device.type == "cuda" else MEASURED)
    batches = Batches(
        ImageStore(job.index, config.max_pixels),
        job.texts,
        Sampler(config.seed, len(job.index), some),
        config.seed,
        config.image_size,
        config.max_bad,
        captions=job.captions,
    )
    read, batch = _rate(lambda: next(batches.stream(0, 1, 0, job.device)), some)
    inputs = Inputs.of(batch, job.transforms)
    if config.keep_features:
        inputs = inputs._replace(pixels=torch.zeros(some, job.model.tower.width, device=job.device))
    backward = backward_of(config, job.model.train())
    compute, _ = _rate(lambda: backward(inputs), some)
    rate = 1 / (1 / read + 1 / compute) if workers == 0 else min(read * workers, compute)
    seconds = images / (rate * world_size())
    return (
        f"time      about {_duration(seconds)} for {images:,} images: {compute:,.0f} images/s a device in {some} at a "
        f"time, {read:,.0f} images/s read and decoded by each of {max(workers, 1)} processes (measured just now)"
    )


def _rate(run: Callable[[], T], images: int) -> tuple[float, T]:
    """Images/s of what handles so many at a time, after a first time that does not count; and what it gave.

    Collective: ranks that meet in `run` have to do so equally often.
    """
    times: list[float] = []
    made = run()
    while not times or (len(times) < REPEATS and agreed(sum(times) < SECONDS)):
        began = time.perf_counter()
        made = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return images / statistics.median(times), made


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"
