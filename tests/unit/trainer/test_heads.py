"""The heads are the papers'."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lift_cache.errors import BadConfig
from lift_trainer.heads import BatchNorm, GatedHead, HeadName, ShareLockHead, build_head, unit_vectors


@pytest.mark.parametrize("name", ["linear", "mlp", "gated", "sharelock"])
def test_every_head_maps_to_the_width_of_the_other_side(name: HeadName) -> None:
    head = build_head(name, 6, 4)
    assert head(torch.randn(3, 6)).shape == (3, 4) and head.dimensions == 4
    assert all(parameter.requires_grad for parameter in head.parameters())


def test_no_head_keeps_what_it_is_given_and_is_refused_where_widths_differ() -> None:
    states = torch.randn(3, 6)
    assert torch.equal(build_head("none", 6, 6)(states), states)
    with pytest.raises(BadConfig, match="6 dimensions on one side and 4 on the other; use a head"):
        build_head("none", 6, 4)


def test_lifts_head_is_linear_gelu_linear_of_the_texts_width() -> None:
    head, states = build_head("mlp", 6, 4), torch.randn(3, 6)
    first, second = head[0], head[2]
    assert (first.weight.shape, second.weight.shape) == ((4, 6), (4, 4))
    assert torch.equal(head(states), second(F.gelu(first(states))))


def test_sails_head_multiplies_a_gate_and_a_value() -> None:
    head, states = GatedHead(6, 4), torch.randn(3, 6) * 5
    assert head.gate.weight.shape == head.value.weight.shape == (48, 6) and head.out.weight.shape == (4, 48)
    normed = F.layer_norm(states, (6,))
    gate = (normed @ head.gate.weight.T).clamp(0, 6)
    assert torch.allclose(
        head(states), (gate * (normed @ head.value.weight.T)) @ head.out.weight.T, atol=1e-5
    )
    assert head.gate.weight.abs().max() <= (6 / 54) ** 0.5 and not head.out.bias.any()


def test_sharelocks_head_has_four_layers_of_4096_with_batch_norm_relu_and_dropout() -> None:
    head = ShareLockHead(6, 4)
    kinds = [type(layer) for layer in head]
    assert kinds == [nn.Linear, BatchNorm, nn.ReLU, nn.Dropout] * 3 + [nn.Linear]
    widths = [(layer.in_features, layer.out_features) for layer in head if isinstance(layer, nn.Linear)]
    assert widths == [(6, 4096), (4096, 4096), (4096, 4096), (4096, 4)]
    assert {layer.p for layer in head if isinstance(layer, nn.Dropout)} == {0.2}


def test_batch_norm_on_one_rank_is_torchs() -> None:
    ours, torchs, states = BatchNorm(6), nn.BatchNorm1d(6), torch.randn(5, 6)
    assert torch.equal(ours(states), torchs(states))
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    assert torch.equal(ours.running_var, torchs.running_var)  # type: ignore[arg-type]


def test_unit_vectors_are_float32_or_finer() -> None:
    for given, kept in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        out = unit_vectors(torch.randn(3, 4).to(given))
        assert out.dtype == kept and out.norm(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
