"""Training: index → order → decode → gather → loss → step.

The same configuration continues a run from its newest whole checkpoint, and on a CPU the result equals that of
an undisturbed run bit for bit: nothing random has state (see `sampling`), and a checkpoint holds the rest.

Under torchrun every rank runs this loop on its share of each global batch; rank 0 alone writes.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import timm
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lift_cache.errors import CacheLocked, LiftError
from lift_cache.files import write_atomic
from lift_trainer.batches import Batches, WorkerDied
from lift_trainer.checkpoint import Checkpoint, checkpoint_path, latest_name, save_checkpoint
from lift_trainer.config import TrainConfig
from lift_trainer.distributed import rank, world_size
from lift_trainer.features import FeatureStore, keep_features
from lift_trainer.gradient_cache import CachedPath, cached_backward
from lift_trainer.heldout import Best, HeldOut
from lift_trainer.images import GIB, ImageStore
from lift_trainer.job import Job
from lift_trainer.launch import agreed, joined, taking_turns
from lift_trainer.lock import only_trainer
from lift_trainer.losses import LossValue
from lift_trainer.metrics import Metrics
from lift_trainer.model import Inputs, LiftModel
from lift_trainer.optim import build_optimizer
from lift_trainer.record import State
from lift_trainer.sampling import torch_seed

EVAL_EVERY = 1_000


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
        LiftError: the loss or its gradient is no longer a number; a worker process died; data, texts or held-out
            data that cannot be read any more. Steps that were done are saved first, wherever that is possible.
        CacheFull: no room for a checkpoint or a line of metrics.
        CacheLocked: another process trains this run, or did since the job was prepared.
    """
    if job.checkpoint and job.start >= job.schedule.total:
        return Outcome(job.start, job.schedule.total, job.checkpoint.path)
    job.config.run.mkdir(parents=True, exist_ok=True)
    with only_trainer(job.config.run) if rank() == 0 else contextlib.nullcontext():
        if latest_name(job.config.run) != job.latest:
            raise CacheLocked(
                f"{job.config.run} was trained on by another lift-train just now; run the same command again"
            )
        return _train(job)


def _train(job: Job) -> Outcome:
    config, model, schedule, device = job.config, job.model, job.schedule, job.device
    if rank() == 0:
        write_atomic(config.run / "config.json", config.model_dump_json(indent=2).encode() + b"\n")

    images = ImageStore(job.index, config.max_pixels)
    features = _features(job, images)
    epochs = schedule.total / job.sampler.steps_per_epoch
    wanted = features is None and epochs > 1 and config.cache_images > 0
    if wanted and images.preload(int(config.cache_images * GIB)):
        job.left_out(images.broken.items())
    batches = Batches(
        images,
        job.texts,
        job.sampler,
        config.seed,
        config.image_size,
        config.max_bad,
        share=job.share,
        captions=job.captions,
        negatives=config.text_negatives,
        features=features,
    )
    workers = worker_count(config, images.in_memory or features is not None, device)
    arriving = batches.stream(job.start, schedule.total, workers, device)
    optimizer = build_optimizer(
        model,
        schedule.peak,
        config.weight_decay,
        name=config.optimizer,
        betas=config.betas,
        eps=config.eps,
        spared=config.spared,
    )
    if job.checkpoint:
        job.checkpoint.load_optimizer(model, optimizer)
    model.train()
    backward = backward_of(config, model)
    watched = _Watched.open(job) if config.eval_data and rank() == 0 else None

    step = saved = job.start
    checkpoint = job.checkpoint

    def save() -> None:
        """The state after `step`; rank 0 writes. Collective."""
        nonlocal checkpoint, saved
        bad = joined(job.rejects.named)
        if rank() == 0:
            best = watched.best.path if watched else None
            checkpoint = save_checkpoint(
                config.run,
                _state(job, step, bad),
                model,
                optimizer,
                job.transforms,
                config.keep,
                before=checkpoint,
                best=best,
            )
        saved = step

    def end(error: LiftError | None) -> NoReturn:
        """By what some rank has met, and says; what was done is saved first. Collective."""
        if step > saved:
            save()
        agreed(True)  # that it is saved: the first rank that ends takes the others with it
        if error is None:
            sys.exit(2)
        where = f"saved as {checkpoint_path(config.run, saved)}" if saved else "nothing was saved yet"
        error.args = (f"{error}; {where}",)
        raise error from None

    with (
        Metrics(
            config.run,
            step,
            schedule.total,
            tensorboard=config.tensorboard,
            wandb=config.wandb,
            settings=config.saved(),
            device=device,
        ) as metrics,
        _Stop() as stop,
    ):
        while True:
            failure: LiftError | None = None
            with metrics.waiting():
                try:
                    batch = next(arriving)
                    job.left_out(batch.bad)
                except LiftError as error:
                    failure = error
                except (RuntimeError, OSError, EOFError) as error:
                    if not workers or "in DataLoader worker process" in str(error):
                        raise
                    failure = _worker_died(step, error)
            if agreed(failure is not None):
                end(failure)

            torch.manual_seed(_dropout_seed(config.seed, step))
            lr = schedule.lr(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            value = backward(Inputs.of(batch, job.transforms))
            limit = config.clip or math.inf
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), limit).item()
            # Before the update: after it, the weights would be lost and the next checkpoint with them.
            _require_finite(value.loss.item(), grad_norm, step + 1, checkpoint)
            optimizer.step()
            optimizer.zero_grad()
            model.loss.clamp_()
            step += 1
            metrics.images += config.batch_size

            last = agreed(stop.signal is not None) or step == schedule.total
            if last or step % config.log_every == 0:
                seen = value.over_ranks()
                metrics.write(
                    step=step,
                    epoch=job.sampler.epoch_of(step - 1),
                    samples=step * config.batch_size,
                    loss=seen.loss.item(),
                    scale=model.loss.scale,
                    lr=lr,
                    grad_norm=grad_norm,
                    accuracy=seen.accuracy.item(),
                    masked=seen.masked.item(),
                    positive=seen.positive.item(),
                    negative=seen.negative.item(),
                )
            improved = False
            if config.eval_data and (step % (config.eval_every or EVAL_EVERY) == 0 or step == schedule.total):
                with metrics.aside():
                    try:
                        improved = watched is not None and watched.score(step, model, metrics)
                    except LiftError as error:
                        failure = error
                    improved = agreed(improved)
                if agreed(failure is not None):
                    end(failure)
            if improved or last or step % config.checkpoint_every == 0:
                save()
                if last:
                    return Outcome(step, schedule.total, checkpoint_path(config.run, step), stop.signal)


def _features(job: Job, images: ImageStore) -> FeatureStore | None:
    """States of a frozen tower, where they are to be kept."""
    config = job.config
    if not config.keep_features:
        return None
    with taking_turns():
        kept = keep_features(
            config.run / "features",
            images,
            job.model.tower,
            config.image_size,
            device=job.device,
            max_bad=config.max_bad,
            precision=config.precision,
        )
    job.left_out(kept.broken.items())
    return kept


@dataclass(frozen=True)
class _Watched:
    """Held-out data, and the step that was best on them. Of rank 0."""

    run: Path
    data: HeldOut
    best: Best

    @classmethod
    def open(cls, job: Job) -> _Watched:
        data = HeldOut.open(job)
        return cls(job.config.run, data, data.best(job.config.run, job.config.best, job.start))

    def score(self, step: int, model: LiftModel, metrics: Metrics) -> bool:
        """Whether the step is the best so far; then its checkpoint comes next."""
        scores = self.data.scores(model)
        metrics.held_out(step, scores)
        return self.best.note(step, scores, checkpoint_path(self.run, step))


def backward_of(config: TrainConfig, model: LiftModel) -> Callable[[Inputs], LossValue]:
    """A function that leaves the gradient of a step's loss, averaged over the ranks, in the model."""
    bf16 = config.precision == "bf16"
    if config.compile:
        model.tower.vit.compile()
        if model.joint:
            model.texts[0].compile()
    if config.gradient_cache:
        return partial(_in_two_passes, model, config.gradient_cache, bf16)
    whole = DistributedDataParallel(model, gradient_as_bucket_view=True) if world_size() > 1 else model

    def backward(inputs: Inputs) -> LossValue:
        value: LossValue = whole(inputs, bf16=bf16)
        value.loss.backward()
        return value.detach()

    return backward


def _in_two_passes(model: LiftModel, chunk: int, bf16: bool, inputs: Inputs) -> LossValue:
    """Towers in chunks (see `gradient_cache`); heads over cached vectors see the whole batch, as batch norm must."""

    def under_autocast(module: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return module(x)

    paths = [CachedPath(model.tower, inputs.pixels, partial(under_autocast, model.encode_images))]
    if model.joint:
        paths.append(CachedPath(model.texts[0], inputs.texts[0], partial(under_autocast, model.texts[0])))

    def loss(x_bd: torch.Tensor, y_bd: torch.Tensor | None = None) -> LossValue:
        if y_bd is None:
            with torch.autocast(x_bd.device.type, torch.bfloat16, enabled=bf16):
                y_bd = model.encode_texts(inputs.texts)
        return model.compare(inputs, x_bd, y_bd, bf16=bf16)

    return cached_backward(model, paths, loss, chunk)


def _dropout_seed(seed: int, step: int) -> int:
    """Ranks must not drop the same units."""
    return torch_seed(seed, step) if rank() == 0 else torch_seed(seed, step, rank())


def _require_finite(loss: float, grad_norm: float, step: int, checkpoint: Checkpoint | None) -> None:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    if rank() != 0 and not math.isfinite(grad_norm):
        sys.exit(2)  # the norm is that of all ranks, and rank 0 says it
    what = f"the gradient norm is {grad_norm}" if math.isfinite(loss) else f"the loss is {loss}"
    before = f"the checkpoint before is {checkpoint.path}" if checkpoint else "no checkpoint was written yet"
    raise LiftError(f"{what} at step {step}; {before}; try a lower --lr or a longer --warmup")


def _worker_died(step: int, error: Exception) -> LiftError:
    how = f"{error}; " if isinstance(error, WorkerDied) else ""
    return LiftError(
        f"a process that reads images died after step {step} ({how}short of memory?); run the same command again, with "
        "fewer --workers if it was short of memory"
    )


def _state(job: Job, step: int, bad: dict[str, str]) -> State:
    return State(
        step=step,
        total_steps=job.schedule.total,
        config=job.config,
        index_digest=job.index.digest,
        texts=job.text_states,
        bad=bad,
        libraries={
            "torch": torch.__version__,
            "timm": timm.__version__,
            "device": _device_name(job.device),
            "devices": str(world_size()),
        },
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def worker_count(config: TrainConfig, in_memory: bool, device: torch.device) -> int:
    """Processes that make batches: beside a GPU as many as help, on a CPU none that would only compete."""
    if config.workers is not None:
        return config.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
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
