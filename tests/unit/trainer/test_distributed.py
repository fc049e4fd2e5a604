"""Two ranks take the step that one would take."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing

from lift_trainer.commands import presets
from lift_trainer.distributed import average_gradients, column_logsumexp, gather, mean, rank, world_size
from tests.unit.trainer.reference import LOSSES, Problem, gradients
from tests.unit.trainer.two_ranks import CASES, IMAGES, LEAVES, PRESETS, Results, worker

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    """What each of two processes found, for all cases."""
    directory = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (2, str(directory)), nprocs=2)
    return [torch.load(Path(directory) / f"{number}.pt") for number in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_loss_and_the_gradients_of_one(
    two_ranks: list[dict[str, Results]], case: str
) -> None:
    expected = CASES[case]()
    for found in two_ranks:
        assert found[case].keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(found[case][name], value, rtol=0, atol=1e-6), name


@pytest.mark.parametrize("case", LEAVES)
def test_one_rank_and_two_have_the_loss_and_the_gradients_of_the_formula(
    two_ranks: list[dict[str, Results]], case: str
) -> None:
    """In float64, written term by term; and without a mask those of open_clip's own losses."""
    name, mask, texts, extra = LEAVES[case]
    problem = Problem.make(IMAGES, texts, extra)
    expected = {"loss": LOSSES[name](problem, mask)} | gradients(LOSSES[name], problem, mask)
    every = [expected]
    if name != "cosine" and (mask, texts, extra) == ("none", 1, 0):
        every.append(open_clips(name, problem))
    for found in (CASES[case](), *(ranks[case] for ranks in two_ranks)):
        for reference in every:
            for which, value in found.items():
                np.testing.assert_allclose(value.numpy(), reference[which], rtol=0, atol=1e-6, err_msg=which)


def open_clips(name: str, problem: Problem) -> dict[str, object]:
    """Loss and gradients by open_clip's losses, on one process."""
    loss = pytest.importorskip("open_clip.loss")
    x, y = (torch.from_numpy(v.copy()).requires_grad_() for v in (problem.x, problem.y[:, 0]))
    log_scale, bias = (
        torch.tensor(v, dtype=torch.float64, requires_grad=True)
        for v in (math.log(problem.scale), problem.bias)
    )
    if name == "infonce":
        value = loss.ClipLoss()(x, y, log_scale.exp())
    else:
        value = loss.SigLipLoss()(x, y, log_scale.exp(), bias)
    value.backward()
    found = {"x": x.grad, "y": y.grad[:, None], "log_scale": log_scale.grad, "bias": bias.grad}  # type: ignore[index]
    return {"loss": value.item(), "extra": problem.extra, **found}


def test_every_preset_is_among_them() -> None:
    joint = {"clip", "lit"} if importlib.util.find_spec("open_clip") else set()
    assert set(PRESETS) == set(presets()) - ({"clip", "lit"} - joint)


def test_one_process_exchanges_nothing() -> None:
    values = torch.randn(3, 2, requires_grad=True)
    assert (rank(), world_size()) == (0, 1)
    assert gather(values) is values and mean(values) is values
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    average_gradients([parameter])
    assert parameter.grad.tolist() == [1.0, 2.0]


def test_the_sum_over_columns_has_the_gradient_of_logsumexp() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64)
    logits[0, 1] = logits[3, 2] = -torch.inf
    here, there = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weights = torch.randn(5, dtype=torch.float64)
    (column_logsumexp(here) * weights).sum().backward()
    (there.logsumexp(0) * weights).sum().backward()
    assert torch.equal(column_logsumexp(logits).isfinite(), torch.ones(5, dtype=torch.bool))
    assert here.grad is not None and there.grad is not None
    assert torch.allclose(here.grad, there.grad, atol=1e-12)
