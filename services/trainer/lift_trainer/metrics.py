"""What a run tells while it goes: metrics.jsonl, TensorBoard, and a progress line."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from lift_cache.files import room_for, write_atomic


class Metrics:
    """Writers of one run. Lines after `step` (of an attempt that was cut off) are dropped first."""

    def __init__(self, run: Path, step: int, total: int, *, tensorboard: bool) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.path = run / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_bytes().splitlines(True) if _step_of(line) <= step]
            write_atomic(self.path, b"".join(kept))
        self.total = total
        self._file = self.path.open("a")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step or None)
        self._overwrite = sys.stderr.isatty()
        self._began = self._since = time.perf_counter()
        self._waited = 0.0
        self.images = 0
        """Images trained on since the last line."""

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._overwrite:
            print(file=sys.stderr)
        try:
            with room_for(self.path.parent):
                self._file.close()
        finally:
            if self._board is not None:
                with room_for(self.path.parent):
                    self._board.close()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def write(
        self,
        *,
        step: int,
        epoch: int,
        samples: int,
        loss: float,
        scale: float,
        lr: float,
        grad_norm: float,
        accuracy: float,
    ) -> None:
        """One line of metrics; rates are those since the line before. Raises CacheFull."""
        now = time.perf_counter()
        seconds = now - self._since
        values = {
            "epoch": epoch,
            "samples": samples,
            "loss": loss,
            "temperature": 1 / scale,
            "scale": scale,
            "lr": lr,
            "grad_norm": grad_norm,
            "accuracy": accuracy,
            "images_per_s": round(self.images / seconds, 1),
            "data_wait": round(self._waited / seconds, 4),
            "time_s": round(now - self._began, 3),
        }
        self.images, self._waited, self._since = 0, 0.0, now
        with room_for(self.path.parent):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
        shown = (
            f"step {step}/{self.total} · epoch {epoch} · loss {loss:.4f} · temperature {1 / scale:.4f} · "
            f"{values['images_per_s']:,.0f} images/s · waiting for data {values['data_wait']:.0%}"
        )
        if self._overwrite:
            print(f"\r\x1b[2K{shown}", end="", file=sys.stderr, flush=True)
        else:
            print(shown, file=sys.stderr)


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # cut off in the middle of a line
        return float("inf")
