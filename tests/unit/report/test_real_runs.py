"""From training to the page: what lift-train and lift-eval write is what lift-report reads."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest

from lift_trainer.cli import eval_main, report_main, train_main
from tests.unit.trainer.conftest import World, png, world, write_tar  # noqa: F401 - a fixture


@pytest.mark.slow
def test_two_runs_are_trained_evaluated_and_compared_on_one_page(
    world: World,  # noqa: F811
    tmp_path: Path,
) -> None:
    samples = [
        (
            f"{i:04d}",
            png(i),
            {
                "captions": [f"drawing number {i}"],
                "negatives": {"swap_obj": f"drawing number {(i + 9) % 28}"},
            },
        )
        for i in range(28)
    ]
    shard = str(write_tar(tmp_path / "held-out.tar", samples))
    for name, epochs in (("long", 30), ("short", 1)):
        settings = {"epochs": epochs, "precision": "fp32", "lr": 3e-3, "text_transform": "center"}
        train_main(world.flags(name, **settings))
    runs = [str(world.root / name) for name in ("long", "short")]
    eval_main(["retrieval", "--run", *runs, "--data", shard, "--device", "cpu"])
    eval_main(["shapes", "--run", *runs, "--data", shard, "--device", "cpu"])
    out = tmp_path / "report.html"
    report_main([*runs, "-o", str(out)])

    text = unescape(
        re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]*>", " ", out.read_text(), flags=re.DOTALL))
    )
    assert "protocol karpathy" in text and "protocol two-way" in text
    assert "Difference from long, in points" in text and "▼" in text
    assert "long and short differ" in text and "Both fail" in text
    assert re.search(r"picked by (long|short)", text)
    assert "35 training captions" in text and "after center long, short" in text
    assert re.search(r"device cpu", text) and "FLOP an image" in text
    assert "“held-out”" in text
