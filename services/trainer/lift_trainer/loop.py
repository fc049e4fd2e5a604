"""Training: index → order → decode → gather → loss → step.

The same configuration continues a run from its newest whole checkpoint, and on a CPU the result equals that of
an undisturbed run bit for bit: nothing random has state (see `sampling`), and a checkpoint holds the rest.
"""

from __future__ import annotations

import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import timm
import torch
from torch import nn

from lift_cache.errors import CacheLocked, LiftError, ServerUnavailable
from lift_cache.files import write_atomic
from lift_trainer.batches import Batches, WorkerDied
from lift_trainer.checkpoint import Checkpoint, State, latest_name, save_checkpoint
from lift_trainer.config import TrainConfig
from lift_trainer.images import GIB, ImageStore
from lift_trainer.job import Job
from lift_trainer.lock import only_trainer
from lift_trainer.metrics import Metrics
from lift_trainer.optim import build_optimizer
from lift_trainer.sampling import torch_seed


@dataclass(frozen=True)
class Outcome:
    step: int
    total: int
    checkpoint: Path
    signal: signal.Signals | None = None
    """What asked it to stop, if anything did."""

    @property
    def finished(self) -> bool:
        return self.step >= self.total


def train(job: Job) -> Outcome:
    """Run the remaining steps of a job.

    Returns:
        Where it ended: after the last step, or at the step during which SIGINT or SIGTERM came; either way
        with a checkpoint.

    Raises:
        BadSource: too many broken images.
        LiftError: the loss or its gradient is no longer a number; a worker process died.
        CacheFull: no room for a checkpoint or a line of metrics.
        CacheLocked: another process trains this run, or did since the job was prepared.
    """
    if job.checkpoint and job.start >= job.schedule.total:
        return Outcome(job.start, job.schedule.total, job.checkpoint.path)
    job.config.run.mkdir(parents=True, exist_ok=True)
    with only_trainer(job.config.run):
        if latest_name(job.config.run) != job.latest:
            raise CacheLocked(
                f"{job.config.run} was trained on by another lift-train just now; run the same command again"
            )
        return _train(job)


def _train(job: Job) -> Outcome:
    config, model, schedule, device = job.config, job.model, job.schedule, job.device
    write_atomic(config.run / "config.json", config.model_dump_json(indent=2).encode() + b"\n")

    images = ImageStore(job.index, config.max_pixels)
    epochs = schedule.total / job.sampler.steps_per_epoch
    if epochs > 1 and config.cache_images > 0 and images.preload(int(config.cache_images * GIB)):
        job.left_out(images.broken.items())
    batches = Batches(images, job.text, job.sampler, config.seed, config.image_size, config.max_bad)
    workers = _workers(config, images.in_memory, device)
    arriving = batches.stream(job.start, schedule.total, workers, device)
    optimizer = build_optimizer(model, schedule.peak, config.weight_decay)
    if job.checkpoint:
        job.checkpoint.load_optimizer(model, optimizer)
    model.train()

    step, checkpoint = job.start, job.checkpoint

    def save(step: int) -> Checkpoint:
        state = _state(job, step)
        return save_checkpoint(
            config.run, state, model, optimizer, job.transform, config.keep, before=checkpoint
        )

    with (
        Metrics(config.run, step, schedule.total, tensorboard=config.tensorboard) as metrics,
        _Stop() as stop,
    ):
        while True:
            with metrics.waiting():
                try:
                    batch = next(arriving)
                except (RuntimeError, OSError, EOFError, ServerUnavailable) as error:
                    from_store = isinstance(error, ServerUnavailable)
                    if not from_store and (not workers or "in DataLoader worker process" in str(error)):
                        raise
                    if checkpoint is None or checkpoint.state.step < step:
                        checkpoint = save(step)
                    if from_store:
                        raise ServerUnavailable(f"{error}; saved as {checkpoint.path}") from None
                    raise _worker_died(step, checkpoint, error) from None
            job.left_out(batch.bad)

            torch.manual_seed(torch_seed(config.seed, step))
            lr = schedule.lr(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                x_bd = model.tower(batch.pixels)
            y_bd = job.transform(batch.text)
            value = model.loss(x_bd, y_bd, batch.captions)
            value.loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip).item()
            # Before the update: after it, the weights would be lost and the next checkpoint with them.
            _require_finite(value.loss.item(), grad_norm, step + 1, checkpoint)
            optimizer.step()
            optimizer.zero_grad()
            model.loss.clamp_()
            step += 1
            metrics.images += config.batch_size

            last = step == schedule.total or stop.signal is not None
            if last or step % config.log_every == 0:
                metrics.write(
                    step=step,
                    epoch=job.sampler.epoch_of(step - 1),
                    samples=step * config.batch_size,
                    loss=value.loss.item(),
                    scale=model.loss.scale,
                    lr=lr,
                    grad_norm=grad_norm,
                    accuracy=value.accuracy.item(),
                )
            if last or step % config.checkpoint_every == 0:
                checkpoint = save(step)
                if last:
                    return Outcome(step, schedule.total, checkpoint.path, stop.signal)


def _require_finite(loss: float, grad_norm: float, step: int, checkpoint: Checkpoint | None) -> None:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    what = f"the gradient norm is {grad_norm}" if math.isfinite(loss) else f"the loss is {loss}"
    before = f"the checkpoint before is {checkpoint.path}" if checkpoint else "no checkpoint was written yet"
    raise LiftError(f"{what} at step {step}; {before}; try a lower --lr or a longer --warmup")


def _worker_died(step: int, saved: Checkpoint, error: Exception) -> LiftError:
    how = f"{error}; " if isinstance(error, WorkerDied) else ""
    return LiftError(
        f"a process that reads images died after step {step} ({how}short of memory?); saved as {saved.path}; "
        "run the same command again, with fewer --workers if it was short of memory"
    )


def _state(job: Job, step: int) -> State:
    return State(
        step=step,
        total_steps=job.schedule.total,
        text_dimensions=job.transform.output_dimensions(job.text.dimensions),
        config=job.config,
        index_digest=job.index.digest,
        snapshot=job.origin.snapshot,
        recipe=job.origin.recipe,
        overlay_digest=job.origin.overlay,
        bad=job.rejects.named,
        libraries={"torch": torch.__version__, "timm": timm.__version__},
    )


def _workers(config: TrainConfig, in_memory: bool, device: torch.device) -> int:
    """Processes that make batches: beside a GPU as many as help, on a CPU none that would only compete."""
    if config.workers is not None:
        return config.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cpu":
        return 0 if in_memory else min(1, cores - 1)
    return max(1, min(16, cores - 1))


class _Stop:
    """Turns the first SIGINT or SIGTERM into `signal`, read after each step; a second one ends at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Stop:
        for kind in (signal.SIGINT, signal.SIGTERM):
            self._before[kind] = signal.signal(kind, self._received)
        return self

    def __exit__(self, *error: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for kind, handler in self._before.items():
            signal.signal(kind, handler)
