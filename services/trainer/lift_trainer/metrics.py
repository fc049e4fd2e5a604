"""What a run tells while it goes: metrics.jsonl and a progress line, TensorBoard, and W&B when asked.

    {"step": 20, "epoch": 0, …, "loss": 3.1, …, "images_per_s": 812.4, "data_wait": 0.01, …}
    {"step": 20, "held_out": {"loss": 3.3, "r@1_image_to_text": 0.21, …}}

A number that is not finite is `null` in the file.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from lift_cache.errors import BadConfig
from lift_cache.files import room_for, write_atomic
from lift_trainer.distributed import rank

GIB = 1 << 30

HELD_OUT = "held_out"
"""Field of a line, and first part of a TensorBoard or W&B name, of what was not measured on training data."""

SHOWN = {
    "epoch": "epoch {:.0f}",
    "loss": "loss {:.4f}",
    "temperature": "temperature {:.4f}",
    "images_per_s": "{:,.0f} images/s",
    "data_wait": "waiting for data {:.0%}",
}
"""What the progress line says, as far as it is known."""

WANDB_ID = "wandb-id"
"""File in a run with its id at W&B, by which a continued run goes on there as one."""


class Metrics:
    """Writers of one run, on rank 0; on the other ranks nothing is written.

    Lines after `step` (of an attempt that was cut off) are dropped first.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        total: int,
        *,
        tensorboard: bool,
        wandb: str | None = None,
        settings: Mapping[str, Any] | None = None,
        device: torch.device = torch.device("cpu"),
    ) -> None:
        """
        Args:
            step: steps done already.
            wandb: project at W&B; None: not there.
            settings: of the run, for W&B.
            device: whose memory is told.

        Raises:
            BadConfig: W&B is asked for and cannot be used.
            CacheFull: no room for the lines that stay.
        """
        self.total, self.device = total, device
        self.images = 0
        """Images trained on since the last line, by all ranks."""
        self._overwrite = sys.stderr.isatty()
        self._writers: list[_Writer] = []
        if rank() == 0:
            run.mkdir(parents=True, exist_ok=True)
            # First what may refuse, so that a refusal changes no file.
            at_wandb = [_Wandb(run, wandb, settings or {})] if wandb is not None else []
            on_board = [_Board(run, step)] if tensorboard else []
            self._writers = [_Lines(run, step), *on_board, *at_wandb]
        self._began = self._since = time.perf_counter()
        self._waited = 0.0

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._overwrite and self._writers:
            print(file=sys.stderr)
        with contextlib.ExitStack() as closing:  # each one, also when another has no room
            for writer in reversed(self._writers):
                closing.callback(writer.close, failed=kind is not None)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Leaves the time inside out of the rates: it is not spent on training."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def write(self, *, step: int, **values: float) -> None:
        """One line of metrics, with what is measured here: rates since the line before, memory, time.

        Args:
            values: any numbers; a `scale` is told as a `temperature` too.

        Raises:
            CacheFull.
        """
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        told: dict[str, float] = {}
        for name, value in values.items():
            if name == "scale":
                told["temperature"] = 1 / value
            told[name] = value
        # What differs between two equal runs comes last.
        told |= {
            "images_per_s": round(self.images / seconds, 1),
            "data_wait": round(self._waited / seconds, 4),
            "memory_gib": round(memory_gib(self.device), 3),
            "time_s": round(now - self._began, 3),
        }
        self.images, self._waited, self._since = 0, 0.0, now
        for writer in self._writers:
            writer.add(step, told)
        parts = [form.format(told[name]) for name, form in SHOWN.items() if name in told]
        self._show(" · ".join([f"step {step}/{self.total}", *parts]), stays=not self._overwrite)

    def held_out(self, step: int, scores: Mapping[str, float]) -> None:
        """One line of held-out scores. Raises CacheFull."""
        for writer in self._writers:
            writer.add(step, scores, HELD_OUT)
        parts = [f"{name} {value:.4f}" for name, value in scores.items()]
        self._show(" · ".join([f"step {step}/{self.total} held out", *parts]), stays=True)

    def _show(self, line: str, *, stays: bool) -> None:
        if not self._writers:
            return
        if self._overwrite:
            line = f"\r\x1b[2K{line}"
        print(line, end="\n" if stays else "", file=sys.stderr, flush=True)


def memory_gib(device: torch.device) -> float:
    """CUDA: the most that tensors took at once so far. Else: the process's resident set now, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / GIB
    except (OSError, ValueError, IndexError):  # no /proc: its largest so far
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest * (1 if sys.platform == "darwin" else 1024) / GIB


# ---------------------------------------------------------------------------------------------- writers


class _Writer(Protocol):
    def add(self, step: int, values: Mapping[str, float], group: str | None = None) -> None:
        """Values of one step; `group`: what they are measured on, if not the training data."""

    def close(self, *, failed: bool) -> None:
        """`failed`: the run ends by an error."""


class _Lines:
    """metrics.jsonl."""

    def __init__(self, run: Path, step: int) -> None:
        path = run / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_bytes().splitlines(True) if _step_of(line) <= step]
            write_atomic(path, b"".join(kept))
        self._run, self._file = run, path.open("a")

    def add(self, step: int, values: Mapping[str, float], group: str | None = None) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = {"step": step, **({group: finite} if group else finite)}
        with room_for(self._run):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()

    def close(self, *, failed: bool) -> None:
        with room_for(self._run):
            self._file.close()


class _Board:
    """TensorBoard's files."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional

        self._run = run
        # All events of a step and later ones are taken back; those of the last step stay.
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def add(self, step: int, values: Mapping[str, float], group: str | None = None) -> None:
        with room_for(self._run):
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}" if group else name, value, step)

    def close(self, *, failed: bool) -> None:
        with room_for(self._run):
            self._board.close()


class _Wandb:
    """A run at Weights & Biases. What goes wrong there after the start is said once and stops nothing."""

    def __init__(self, run: Path, project: str, settings: Mapping[str, Any]) -> None:
        wandb = require_wandb(project)
        self._run: Any = None
        try:
            self._run = wandb.init(
                project=project,
                id=_wandb_id(run),
                resume="allow",
                name=run.resolve().name,
                dir=str(run),
                config=dict(settings),
                # Its own copy of the terminal would tear the progress line.
                settings=wandb.Settings(console="off"),
            )
        except (
            Exception
        ) as error:  # also usage errors of the service behind it, which have types of their own
            raise BadConfig(
                f"--wandb {project}: {_one_line(error)}; run `wandb login`, set WANDB_MODE=offline, or leave it out"
            ) from None

    def add(self, step: int, values: Mapping[str, float], group: str | None = None) -> None:
        # A continued run comes by steps that W&B has already, and it takes none twice.
        if self._run is None or step < self._run.step:
            return
        named = {f"{group}/{name}" if group else name: value for name, value in values.items()}
        self._try(lambda run: run.log(named, step=step))

    def close(self, *, failed: bool) -> None:
        self._try(lambda run: run.finish(exit_code=int(failed)))

    def _try(self, act: Any) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:  # a day of training is worth more than its log
            self._run = None
            print(f"W&B takes no more metrics ({_one_line(error)}); training goes on", file=sys.stderr)


def require_wandb(project: str) -> Any:
    """The module wandb. Raises BadConfig: it is not installed."""
    try:
        import wandb

        wandb.init, wandb.Settings  # noqa: B018  a folder ./wandb, as wandb makes them, imports as well
    except (ImportError, AttributeError):
        raise BadConfig(
            f"--wandb {project}: wandb is not installed; pip install 'lift-trainer[wandb]', or leave it out"
        ) from None
    return wandb


def _wandb_id(run: Path) -> str:
    """The id of this run at W&B, for all its continuations. Raises CacheFull."""
    path = run / WANDB_ID
    with contextlib.suppress(FileNotFoundError):
        return path.read_text().strip()
    made = secrets.token_hex(8)
    write_atomic(path, f"{made}\n".encode())
    return made


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # cut off in the middle of a line
        return float("inf")
