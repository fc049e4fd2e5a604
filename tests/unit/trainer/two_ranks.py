"""One training step of many kinds, on any number of ranks: what test_distributed.py runs on one and on two.

In float64, so that what differs is not rounding. Each case is a function of nothing but its name: every
rank makes the same model and the same global batch, and takes its share.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lift_trainer.distributed import gather, mean, rank, world_size
from lift_trainer.gradient_cache import CachedPath, cached_backward
from lift_trainer.heads import ShareLockHead, unit_vectors
from lift_trainer.losses import Cosine, Extra, Loss, LossValue, build_loss
from lift_trainer.text_towers import CachedTextTower, ClipTextTower, TextShape
from lift_trainer.towers import build_tower
from tests.unit.trainer.reference import Problem

IMAGES, TEXTS, EXTRA, SIDE = 6, 3, 6, 16
TOWER = "vit:width=16,depth=1,heads=2,patch=8"
Results = dict[str, torch.Tensor]


class Step(nn.Module):
    """Towers and loss under one forward, as DDP wants it."""

    def __init__(self, image: nn.Module, text: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.image, self.text, self.loss = image, text, loss

    def forward(self, images: torch.Tensor, texts: torch.Tensor, rest: Callable[..., LossValue]) -> LossValue:
        return rest(self.loss, self.image(images), self.text(texts))


class Project(nn.Module):
    """The least tower: one matrix."""

    def __init__(self, width: int, dimensions: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, dimensions)
        self.dropout = nn.Dropout(0.0)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return unit_vectors(self.dropout(self.layer(inputs)))


def share(values: torch.Tensor) -> torch.Tensor:
    size = len(values) // world_size()
    return values[rank() * size : (rank() + 1) * size]


def results(model: nn.Module, value: LossValue) -> Results:
    found = {name: mean(part.detach()) for name, part in value._asdict().items()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name.removeprefix("module.")] = parameter.grad.clone()
    for name, buffer in model.named_buffers():
        if "running" in name:
            found[name.removeprefix("module.")] = buffer.clone()
    return found


def wrapped(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model) if world_size() > 1 else model


def loss_case(
    name: str,
    mask: str,
    texts: int,
    extra: int,
    *,
    image_trains: bool,
    text_trains: bool,
    chunk: int | None = None,
) -> Results:
    """A loss between two matrices, either of which may be frozen."""
    problem = Problem.make(IMAGES, texts, extra)
    torch.manual_seed(0)
    model = Step(Project(5, 4), Project(5, 4), build_loss(name, mask)).double()  # type: ignore[arg-type]
    model.image.requires_grad_(image_trains)
    model.text.requires_grad_(text_trains)
    captions, images = share(torch.from_numpy(problem.captions)), share(torch.from_numpy(problem.images))
    further = share(torch.from_numpy(problem.extra))
    numbers = share(torch.from_numpy(problem.extra_captions)), share(torch.from_numpy(problem.known))

    def rest(loss: Loss, x_bd: torch.Tensor, y_btd: torch.Tensor) -> LossValue:
        beyond = Extra(model.text(further), *numbers) if extra else None
        flat = texts == 1
        return loss(
            x_bd, y_btd[:, 0] if flat else y_btd, captions[:, 0] if flat else captions, images, beyond
        )

    inputs = share(torch.from_numpy(problem.x)), share(torch.from_numpy(problem.y))
    whole = wrapped(model)
    if chunk is None:
        value = whole(*inputs, rest)
        value.loss.backward()
    else:
        paths = [CachedPath(model.image, inputs[0]), CachedPath(model.text, inputs[1])]
        value = cached_backward(whole, paths, partial(rest, model.loss), chunk)
    return results(whole, value)


def leaves_case(name: str, mask: str, texts: int, extra: int) -> Results:
    """A loss of vectors themselves, and its gradient at each: what the formula says, whoever holds them."""
    problem = Problem.make(IMAGES, texts, extra)
    loss = build_loss(name, mask, scale=problem.scale, bias=problem.bias).double()  # type: ignore[arg-type]
    if not isinstance(loss, Cosine):
        loss.log_scale.data.fill_(math.log(problem.scale))  # float32 had rounded it
    x, y, further = (
        share(torch.from_numpy(values)).clone().requires_grad_()
        for values in (problem.x, problem.y, problem.extra)
    )
    captions, images, numbers, known = (
        share(torch.from_numpy(values))
        for values in (problem.captions, problem.images, problem.extra_captions, problem.known)
    )
    flat = texts == 1
    value = loss(
        x,
        y[:, 0] if flat else y,
        captions[:, 0] if flat else captions,
        images,
        Extra(further, numbers, known) if extra else None,
    )
    value.loss.backward()
    found = {"loss": mean(value.loss.detach())}
    for which, leaf in (("x", x), ("y", y), ("extra", further)):
        # Of the sum of the ranks' losses, whose mean is the loss.
        found[which] = gather(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad) / world_size()
    for which, parameter in loss.named_parameters():
        assert parameter.grad is not None
        found[which] = mean(parameter.grad)
    return found


def preset_case(name: str) -> Results:
    """The towers, heads and loss of a preset, in small."""
    torch.manual_seed(1)
    dimensions, pixels = 8, torch.randint(0, 256, (IMAGES, 3, SIDE, SIDE), dtype=torch.uint8)
    vectors = unit_vectors(torch.randn(IMAGES, dimensions, dtype=torch.float64))
    tokens = torch.randint(1, 49_000, (IMAGES, 7))
    image = partial(build_tower, TOWER, SIDE, "learned:0.5")
    text: nn.Module = CachedTextTower(dimensions, dimensions, "none")
    texts = vectors
    small = TextShape(context=7, width=16, depth=1, heads=2)
    loss: Loss = build_loss("infonce", "none")
    match name:
        case "lift":
            tower = image(dimensions)
        case "recommended":
            tower, loss = image(dimensions), build_loss("infonce", "caption+image")
        case "lift-cosine":
            tower, loss = image(dimensions), Cosine()
        case "clip":
            tower, text, texts = image(dimensions, head="linear"), ClipTextTower(dimensions, small), tokens
        case "lit":
            tower, text, texts = image(16, head="none"), ClipTextTower(16, small), tokens
            tower.requires_grad_(False)
        case "sharelock":
            tower, text = image(16, head="none"), CachedTextTower(dimensions, 16, "sharelock")
            tower.requires_grad_(False)
            text.head = ShareLockHead(dimensions, 16, hidden=32, dropout=0.0)
            loss = build_loss("infonce", "none", scale=math.exp(2.6592), learn_scale=False)
        case "sail":
            tower = image(12, head="gated")
            tower.vit.requires_grad_(False)
            text = CachedTextTower(dimensions, 12, "gated")
            loss = build_loss("siglip", "none", scale=20)
            texts = torch.stack([vectors, vectors.roll(1, 1)], 1)
    captions, images = torch.arange(IMAGES), torch.arange(IMAGES)
    captions[3], images[5] = captions[1], images[0]
    if texts.ndim == 3:
        captions = torch.stack([captions, 10 + captions], 1)
    model = wrapped(Step(tower, text, loss).double())

    def rest(loss: Loss, x_bd: torch.Tensor, y_bd: torch.Tensor) -> LossValue:
        return loss(x_bd, y_bd, share(captions), share(images))

    value = model(share(pixels), share(texts), rest)
    value.loss.backward()
    return results(model, value)


def gather_case() -> Results:
    """Whether gathered vectors carry a gradient (cached ones must not, trained ones must), and what is logged."""
    vectors = torch.ones(2, 3)
    trained = gather(vectors.clone().requires_grad_())
    apart = 2 * rank() - (world_size() - 1)
    return {
        "cached": torch.tensor(gather(vectors).requires_grad),
        "trained": torch.tensor(trained.requires_grad),
        "logged": torch.stack(list(LossValue(*(torch.arange(5.0) + apart).unbind()).over_ranks())),
    }


CASES: dict[str, Callable[[], Results]] = {"gather": gather_case}
for _loss, _masks, _extras in (
    ("infonce", ("none", "caption+image"), (0, EXTRA)),
    ("siglip", ("none", "caption+image"), (0, EXTRA)),
    ("cosine", ("none",), (0,)),
):
    for _mask, _texts, _extra in product(_masks, (1, TEXTS), _extras):
        for _who, _image, _text in (("image", True, False), ("text", False, True), ("both", True, True)):
            CASES[f"{_loss} {_mask} texts={_texts} extra={_extra} trains={_who}"] = partial(
                loss_case, _loss, _mask, _texts, _extra, image_trains=_image, text_trains=_text
            )
LEAVES = {
    f"leaves {_loss} {_mask} texts={_texts} extra={_extra}": (_loss, _mask, _texts, _extra)
    for _loss, _masks, _extras in (
        ("infonce", ("none", "caption", "caption+image"), (0, EXTRA)),
        ("siglip", ("none", "caption", "caption+image"), (0, EXTRA)),
        ("cosine", ("none",), (0,)),
    )
    for _mask, _texts, _extra in product(_masks, (1, TEXTS), _extras)
}
CASES |= {name: partial(leaves_case, *problem) for name, problem in LEAVES.items()}
CACHED = {
    f"{who} {loss}": partial(
        loss_case, loss, "caption+image", TEXTS, EXTRA, image_trains=True, text_trains=who == "both"
    )
    for loss in ("infonce", "siglip", "cosine")
    for who in ("image", "both")
}
CASES |= {f"cached {name}": partial(case, chunk=2) for name, case in CACHED.items()}
JOINT = ["clip", "lit"] if importlib.util.find_spec("open_clip") else []
PRESETS = ["lift", "lift-cosine", "recommended", "sharelock", "sail", *JOINT]
CASES |= {f"preset {name}": partial(preset_case, name) for name in PRESETS}


def worker(number: int, ranks: int, directory: str) -> None:
    """Runs every case as one of several ranks and writes what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=number, world_size=ranks)
    try:
        torch.save({name: case() for name, case in CASES.items()}, Path(directory) / f"{number}.pt")
    finally:
        dist.destroy_process_group()
