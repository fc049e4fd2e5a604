"""What a training step costs before it is taken: floating-point operations and peak memory.

Nothing is computed and nothing of the model's size allocated. FLOPs are PyTorch's own count
(`torch.utils.flop_counter`: matrix products, convolutions and attention, 2 for a multiply and add; norms,
activations and the optimiser count nothing) over tensors on the meta device. Memory is counted tensor by
tensor over one forward and backward pass of fake tensors, which know their size and have no content.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lift_cache.errors import BadConfig
from lift_trainer.config import OptimizerName, TextShape
from lift_trainer.text_towers import CachedTextTower, ClipTextTower
from lift_trainer.towers import ImageTower

GIB = 2**30
OPTIMISER_FLOATS: dict[OptimizerName, int] = {"adamw": 2, "adam": 2, "lion": 1}
"""float32 values that an optimiser keeps for each trained parameter."""

TextTower = CachedTextTower | ClipTextTower


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, of one image unless said otherwise."""

    forward: int = 0
    backward: int = 0

    @property
    def step(self) -> int:
        """Both passes; the optimiser's share is nothing beside them."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.forward * times, self.backward * times)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, when a step needs most."""

    weights: int
    """Parameters, trained or not, and buffers."""
    optimiser: int
    step: int
    """Activations, gradients, bf16 copies of weights, inputs and logits, as many as live at once."""

    @property
    def peak(self) -> int:
        return self.weights + self.optimiser + self.step


@dataclass(frozen=True)
class StepShape:
    """The sizes of one step."""

    batch: int
    """Images on each device; with gradient caching, those of one pass."""
    image_size: int
    """Side, in pixels."""
    captions: int = 1
    """Texts an image has from each text tower."""
    others: int = 0
    """Texts that images are compared with beyond their device's own: of other ranks, and further negatives."""
    features: bool = False
    """Features of a frozen tower are kept, so that only its head runs."""

    def columns(self, towers: int) -> int:
        """Texts that every image is compared with."""
        return self.batch * self.captions * towers + self.others


# -------------------------------------------------------------------------------------------------- FLOPs


def image_flops(tower: ImageTower, image_size: int, *, features: bool = False) -> Flops:
    """Of one image through its tower. A frozen ViT has no backward pass, and none at all with `features`.

    A recomputation for gradient checkpointing counts as backward.
    """
    if features:
        return count_flops(tower.head, torch.empty(2, tower.width, device="meta"))
    return count_flops(tower, _pixels(2, image_size, "meta"))


def text_flops(tower: TextTower) -> Flops:
    """Of one caption through its tower; zero for cached vectors without a head.

    A `ClipTextTower` works on its whole context, however short the caption, and its causal mask saves
    nothing: all context² products are computed, and count.
    """
    return count_flops(tower, _text_input(tower, 2, "meta"))


def contrast_flops(columns: int, dimensions: int, *, texts_train: bool, images_train: bool = True) -> Flops:
    """Of one image's cosines with `columns` texts of so many dimensions, by formula.

    Args:
        texts_train, images_train: whether that side has a gradient.
    """
    products = 2 * columns * dimensions
    return Flops(products, products * (images_train + texts_train))


def joint_text_flops(shape: TextShape, dimensions: int) -> Flops | None:
    """Of one caption through CLIP's text tower of this shape; None where open_clip is not installed."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return text_flops(ClipTextTower(dimensions, shape))
    except BadConfig:
        return None


def count_flops(module: nn.Module, inputs: torch.Tensor) -> Flops:
    """Of one row of `inputs` (on the meta device) through a module, wherever that lies, and back."""
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)

    def there_and_back(module: nn.Module) -> None:
        with forward:
            out = module(inputs)
        if out.requires_grad:
            with backward:
                out.sum().backward()

    # Not on the CPU: its fused attention is unknown to the counter, which would leave it out.
    with _undisturbed(module):
        _emptied(module, device="meta")(there_and_back)
    rows = len(inputs)
    return Flops(forward.get_total_flops() // rows, backward.get_total_flops() // rows)


# ------------------------------------------------------------------------------------------------- memory


def step_memory(
    tower: ImageTower,
    texts: Sequence[TextTower],
    shape: StepShape,
    *,
    precision: Literal["bf16", "fp32"] = "bf16",
    optimizer: OptimizerName = "adamw",
) -> Memory:
    """Peak memory of a step, whatever its size: the model's dtypes, CPU autocast, fused attention.

    Counted over a forward and backward pass, with InfoNCE without a mask in place of the loss. Not in it:
    what an allocator cannot use between blocks, workspaces of kernels, buckets of DDP, the images that
    wait. CUDA's autocast keeps norms in float32, which the CPU's does not, so a GPU takes somewhat more.
    """
    modules: list[nn.Module] = [tower, *texts]
    parameters = [p for module in modules for p in module.parameters()]
    trained = sum(p.numel() for p in parameters if p.requires_grad)

    def step(tower: ImageTower, *texts: TextTower) -> None:
        # Named, for a batch stays until its step is over.
        pixels = _pixels(0 if shape.features else shape.batch, shape.image_size, "cpu")
        kept_bw = torch.empty(shape.batch if shape.features else 0, tower.width)
        vectors = [_text_input(text, shape.batch * shape.captions, "cpu") for text in texts]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            x_bd = tower.project(kept_bw) if shape.features else tower(pixels)
            y_td = [text(given) for text, given in zip(texts, vectors, strict=True)]
        others_md = torch.empty(shape.others, x_bd.shape[1])
        _contrast(x_bd, torch.cat([*y_td, others_md])).backward()

    with _undisturbed(*modules), FakeTensorMode(), _LiveBytes() as live:
        run = _emptied(*modules, device="cpu")
        weights = live.now
        run(step)
    return Memory(weights, 4 * OPTIMISER_FLOATS[optimizer] * trained, live.peak - weights)


def _contrast(x_bd: torch.Tensor, y_td: torch.Tensor) -> torch.Tensor:
    """InfoNCE's work with a device's own images, in the order in which it is done; the value means nothing."""
    logits_bt = (x_bd * x_bd.new_empty(())) @ y_td.T
    images_b, texts_t = (torch.empty(n, dtype=torch.int64) for n in logits_bt.shape)
    return F.cross_entropy(logits_bt, images_b) + F.cross_entropy(logits_bt.T, texts_t)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made under it that are still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._alive:
            return  # a view, or what an in-place operation returned
        size = storage.nbytes()

        def freed(_: object) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


# --------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Plan:
    """What a step of a model costs; `lines` is for people."""

    shape: StepShape
    parameters: int
    trained: int
    image: Flops
    text: Flops
    """Of all texts of an image."""
    contrast: Flops
    tokens: int | None
    """Caption length of `joint`, and of `text` when a text tower is trained from tokens."""
    joint: Flops | None
    """What a joint text tower takes of it, or would add for one text of each image; None: not to be told."""
    is_joint: bool
    memory: Memory

    @property
    def flops(self) -> Flops:
        """Of an image with all its texts."""
        return self.image + self.text + self.contrast

    def lines(self) -> list[str]:
        total = self.flops
        compute = (
            f"compute   {_giga(total.step)} GFLOPs an image "
            f"({_giga(total.forward)} forward, {_giga(total.backward)} backward)"
        )
        if self.joint and self.is_joint:
            share = self.joint.step / total.step
            compute += (
                f", of which the text tower {_giga(self.joint.step)} at {self.tokens} tokens ({share:.0%})"
            )
        elif self.joint:
            compute += (
                f"; a joint text tower would add {_giga(self.joint.step)} at {self.tokens} tokens "
                f"({self.joint.step / total.step:+.0%})"
            )
        memory = self.memory
        return [
            compute,
            f"memory    about {_gib(memory.peak)} GiB a device for {self.shape.batch:,} images: weights "
            f"{_gib(memory.weights)}, optimiser {_gib(memory.optimiser)}, activations and gradients "
            f"{_gib(memory.step)} (an estimate)",
        ]


def plan_step(
    tower: ImageTower,
    texts: Sequence[TextTower],
    shape: StepShape,
    *,
    precision: Literal["bf16", "fp32"] = "bf16",
    optimizer: OptimizerName = "adamw",
    joint: TextShape = TextShape(),
) -> Plan:
    """Cost of a step of a model, in about three seconds for ViT-B/16; leaves model and random streams alone.

    Args:
        texts: one tower for each cache, or one `ClipTextTower`.
        joint: the text tower to compare with where all texts come from a cache.
    """
    parameters = [p for module in (tower, *texts) for p in module.parameters()]
    tokens = [text.shape.context for text in texts if isinstance(text, ClipTextTower)]
    text = Flops()
    for one in texts:
        text += text_flops(one) * shape.captions
    dimensions = texts[0].dimensions
    return Plan(
        shape=shape,
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        image=image_flops(tower, shape.image_size, features=shape.features),
        text=text,
        contrast=contrast_flops(
            shape.columns(len(texts)),
            dimensions,
            texts_train=any(one.trains for one in texts),
            images_train=any(p.requires_grad for p in tower.parameters()),
        ),
        tokens=tokens[0] if tokens else joint.context,
        joint=text if tokens else joint_text_flops(joint, dimensions),
        is_joint=bool(tokens),
        memory=step_memory(tower, texts, shape, precision=precision, optimizer=optimizer),
    )


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.3g}" if flops < 1e12 else f"{flops / 1e9:,.0f}"


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f}" if size > GIB / 10 else f"{size / GIB:.2g}"


# ------------------------------------------------------------------------------------------------ helpers


class _Within(nn.Module):
    """Calls a function with modules, so that `functional_call` lends them a state for all that it does."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.inner = nn.ModuleList(modules)

    def forward(self, body: Callable[..., None]) -> None:
        body(*self.inner)


def _emptied(*modules: nn.Module, device: str) -> Callable[[Callable[..., None]], None]:
    """Runs a function with modules whose weights and buffers have a size and no content.

    They are made here: on the meta device, or fake where a fake mode is on. The function's backward pass
    belongs inside, since gradient checkpointing runs modules once more there.
    """
    within = _Within(modules)
    state: dict[str, torch.Tensor] = {
        name: nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device), requires_grad=p.requires_grad)
        for name, p in within.named_parameters()
    }
    for name, buffer in within.named_buffers():
        state[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return lambda body: functional_call(within, state, (body,))


def _pixels(images: int, side: int, device: str) -> torch.Tensor:
    return torch.empty(images, 3, side, side, dtype=torch.uint8, device=device)


@contextmanager
def _undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Nothing random moves, and batch norms, which would speak to the other ranks, use what they know."""
    norms = [
        m for module in modules for m in module.modules() if isinstance(m, nn.BatchNorm1d) and m.training
    ]
    for norm in norms:
        norm.training = False
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            yield
    finally:
        for norm in norms:
            norm.training = True


def _text_input(tower: TextTower, rows: int, device: str) -> torch.Tensor:
    if isinstance(tower, ClipTextTower):
        return torch.empty(rows, tower.shape.context, dtype=torch.int64, device=device)
    linear = next((m for m in tower.head.modules() if isinstance(m, nn.Linear)), None)
    return torch.empty(rows, linear.in_features if linear else tower.dimensions, device=device)
