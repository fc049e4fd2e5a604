"""A run, decided before its first step: what is trained, on what, in which order, from where."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lift_cache.errors import BadConfig
from lift_cache.snapshot import split_location
from lift_trainer.checkpoint import (
    Checkpoint,
    find_checkpoint,
    latest_name,
    refuse_other_config,
    refuse_other_inputs,
)
from lift_trainer.config import Span, TrainConfig, TransformSpec
from lift_trainer.losses import Loss, build_loss
from lift_trainer.optim import CosineSchedule, scaled_lr
from lift_trainer.rejects import Rejects
from lift_trainer.samples import Index, build_index
from lift_trainer.sampling import Sampler, torch_seed
from lift_trainer.text import TextOrigin, TextVectors, open_text
from lift_trainer.towers import ImageTower, build_tower
from lift_trainer.transform import TextTransform, fit_transform


class LiftModel(nn.Module):
    """Everything that is trained: the image tower and the loss's temperature."""

    def __init__(self, tower: ImageTower, loss: Loss) -> None:
        super().__init__()
        self.tower = tower
        self.loss = loss


def build_model(config: TrainConfig, dimensions: int) -> LiftModel:
    """A model with fresh weights, a function of the seed. Raises BadConfig."""
    torch.manual_seed(torch_seed(config.seed, 0))
    tower = build_tower(config.tower, config.image_size, config.pos_embed, dimensions)
    return LiftModel(tower, build_loss(config.loss, config.mask))


@dataclass(frozen=True)
class Job:
    config: TrainConfig
    device: torch.device
    index: Index
    rejects: Rejects
    text: TextVectors
    origin: TextOrigin
    transform: TextTransform
    sampler: Sampler
    schedule: CosineSchedule
    model: LiftModel
    checkpoint: Checkpoint | None
    """Where the run goes on; None at its beginning."""
    latest: str | None
    """Name of the newest checkpoint ever written, before this was decided."""

    @property
    def start(self) -> int:
        """Steps done already."""
        return self.checkpoint.state.step if self.checkpoint else 0

    def left_out(self, bad: Iterable[tuple[int, str]]) -> None:
        """Name and count samples whose image cannot be read. Raises BadSource beyond `max_bad`."""
        for sample, reason in bad:
            self.rejects.add(self.index.where(sample), reason)

    def plan(self) -> str:
        """What will happen, in six lines."""
        config, index, schedule = self.config, self.index, self.schedule
        text = self.origin.recipe.model if self.origin.recipe else "hashed word n-grams"
        if self.origin.snapshot:
            text += f", snapshot {self.origin.snapshot}"
        if self.origin.control == "permuted":
            text += ", dealt to the wrong captions"
        left_out = f", {len(self.rejects.named)} left out" if self.rejects.named else ""
        epochs = schedule.total / self.sampler.steps_per_epoch
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return "\n".join(
            [
                f"data      {len(index):,} images, {len(index.pairs):,} captions, "
                f"{len(index.captions):,} distinct{left_out}",
                f"text      {text}, {self.text.dimensions} dimensions, transform {self.transform.spec}",
                f"tower     {config.tower} at {config.image_size}, position embedding {config.pos_embed}, "
                f"{parameters:,} parameters with the head",
                f"schedule  {schedule.total:,} steps of {config.batch_size:,} images ({epochs:.3g} epochs), "
                f"learning rate {schedule.peak:.3g}, warm-up {schedule.warmup:,} steps",
                f"device    {self.device}, {config.precision}",
                f"run       {f'continues {config.run} at step {self.start:,}' if self.start else config.run}",
            ]
        )


def prepare(config: TrainConfig) -> Job:
    """Decide everything; nothing is written but the overlay of `--on-missing embed`.

    Raises:
        LiftError: some input cannot be used, or is not what the run in `config.run` began with.
    """
    device = choose_device(config.device)
    if config.run.exists() and not config.run.is_dir():
        raise BadConfig(f"--run {config.run} is a file; name a directory")
    latest = latest_name(config.run)  # first: another process may still be writing
    checkpoint = find_checkpoint(config.run)
    rejects = Rejects(config.max_bad)
    if checkpoint:
        refuse_other_config(config.run, checkpoint.state, config)
        rejects.named.update(checkpoint.state.bad)
    index = build_index(
        config.data,
        rejects,
        caption_field=config.caption_field,
        images=config.images,
        image_field=config.image_field,
    )
    text, index, origin = open_text(
        index,
        cache=_pinned(config, checkpoint),
        control=config.text_control,
        on_missing=config.on_missing,
        server=config.server,
        overlay=config.run / "overlay.safetensors",
        seed=config.seed,
    )
    if checkpoint:
        refuse_other_inputs(
            config.run,
            checkpoint.state,
            index_digest=index.digest,
            snapshot=origin.snapshot,
            overlay_digest=origin.overlay,
        )
        transform = checkpoint.load_transform()
    else:
        transform = fit_transform(TransformSpec.parse(config.text_transform), text, index.keys)
    sampler = Sampler(config.seed, len(index), config.batch_size)
    total = config.steps or config.epochs * sampler.steps_per_epoch
    schedule = CosineSchedule(
        scaled_lr(config.lr, config.lr_scaling, config.batch_size, config.base_batch),
        Span.parse(config.warmup).in_steps(config.batch_size, total),
        total,
    )
    model = build_model(config, transform.output_dimensions(text.dimensions))
    if checkpoint:
        checkpoint.load_model(model)
    return Job(
        config=config,
        device=device,
        index=index,
        rejects=rejects,
        text=text,
        origin=origin,
        transform=transform.to(device),
        sampler=sampler,
        schedule=schedule,
        model=model.to(device),
        checkpoint=checkpoint,
        latest=latest,
    )


def _pinned(config: TrainConfig, checkpoint: Checkpoint | None) -> str | None:
    """The cache, at the snapshot with which the run began even when there are newer ones."""
    if config.cache is None or checkpoint is None or checkpoint.state.snapshot is None:
        return config.cache
    path, wanted = split_location(config.cache)
    return config.cache if wanted else f"{path}@{checkpoint.state.snapshot}"


def choose_device(name: str) -> torch.device:
    """`auto` is cuda where there is one. Raises BadConfig."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadConfig(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device
