"""Two ranks take the step that one would take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from lift_trainer.distributed import average_gradients, column_logsumexp, gather, mean, rank, world_size
from tests.unit.trainer.two_ranks import CASES, Results, worker

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
