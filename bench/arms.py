"""What the training benchmarks share: arms that are skipped when already done, and intervals over seeds."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin double the CPU time

from lift_cache.files import write_atomic
from lift_trainer.config import TrainConfig
from lift_trainer.evaluators.protocol import Encoder
from lift_trainer.evaluators.shapes import TASKS, open_shapes
from lift_trainer.job import prepare
from lift_trainer.loop import train

# Student's t, two-sided 95 %, by degrees of freedom.
T_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


@dataclass(frozen=True)
class Interval:
    """Mean over seeds with its 95 % t-interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """From 2 to 10 values; a single one has no interval (low = high = nan)."""
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean, math.nan, math.nan)
        half = T_95[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
        return cls(mean, mean - half, mean + half)

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:6.1%}"
        return f"{self.mean:6.1%} [{self.low:6.1%}, {self.high:6.1%}]"


def run_arm(
    out: Path, name: str, config: dict[str, Any], evaluate: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Train and evaluate one arm into OUT/runs/NAME; its result is OUT/results/NAME.json, reused when there.

    An arm that was cut off goes on at its checkpoint. Raises BadConfig when OUT holds it with other settings.
    """
    settled = TrainConfig.model_validate(config | {"run": out / "runs" / name, "tensorboard": False})
    result = out / "results" / f"{name}.json"
    if result.exists():
        prepare(settled)  # refuses other settings, data or vectors by name
        return dict(json.loads(result.read_text()))
    began = time.process_time()
    outcome = train(prepare(settled))
    if not outcome.finished:
        raise KeyboardInterrupt
    scores = evaluate(settled.run) | {"arm": name, "cpu_seconds": round(time.process_time() - began, 1)}
    result.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(result, (json.dumps(scores, indent=1) + "\n").encode())
    return scores


def shapes_accuracy(encoder: Encoder, data: Path, split: str) -> dict[str, float]:
    """Two-way accuracy by task on one split of what `lift-data shapes` wrote."""
    scores = open_shapes([str(data / f"{split}-*.tar")], split).evaluate(encoder).scores
    return {task: scores[task].value for task in TASKS}
