"""What a run will do, said before it does it."""

from __future__ import annotations

from lift_trainer.job import Job


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


def dry_run(job: Job) -> str:
    """What it will cost."""
    return ""
