"""Choices made again: in place of a router's own, with its weights for them, nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moe_fast.layers import MoEMLP, RoutingInfo
from moe_fast.losses.routing_record import record_routing
from moe_fast.losses.routing_replay import RoutingChoices


class TwoLayers(nn.Module):
    def __init__(self, num_experts: int = 5, **settings) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([MoEMLP(4, 6, num_experts, **settings) for _ in range(2)])

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x, routing=RoutingInfo(token_mask=mask))
        return x


def texts(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    return torch.randn(3, 6, 4, generator=generator), mask


def index_of(model: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with record_routing(model) as recorder:
        model(x, mask)
    return recorder.result().top_k_index


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_experts_per_tok": 2},
        {"routing": "sentence_topk", "num_experts_per_tok": 2},
        {"num_experts": 40_000},  # more than two bytes hold
    ],
)
def test_another_input_is_routed_as_the_first(settings):
    model = TwoLayers(**settings)
    (x, mask), (other, _) = texts(0), texts(1)
    choices = RoutingChoices(model)
    with choices.capturing():
        model(x, mask)
    expected = index_of(model, x, mask)
    assert not torch.equal(index_of(model, other, mask), expected)
    for _ in range(2):  # as often as it runs: gradient checkpointing runs it again
        with choices.replaying():
            assert torch.equal(index_of(model, other, mask), expected)
    assert not torch.equal(index_of(model, other, mask), expected)  # over


def test_the_same_input_gives_the_same_output_and_gradients():
    model = TwoLayers(num_experts_per_tok=2).double()
    x, mask = texts(0)
    choices = RoutingChoices(model)
    with choices.capturing():
        expected = model(x.double(), mask)
    with choices.replaying():
        again = model(x.double(), mask)
    assert torch.equal(again, expected)
    upstream = torch.randn_like(again)
    found, wanted = (
        torch.autograd.grad(y, list(model.parameters()), upstream) for y in (again, expected)
    )
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)  # float64 rounding


def test_counts_are_those_of_the_replayed_choices():
    model = TwoLayers()
    (x, mask), (other, _) = texts(0), texts(1)
    seen = []
    model.layers[1].router.register_forward_hook(lambda m, i, output: seen.append(output))
    choices = RoutingChoices(model)
    with choices.capturing():
        model(x, mask)
    with choices.replaying():
        model(other, mask)
    assert torch.equal(seen[0].tokens_per_expert, seen[1].tokens_per_expert)
    assert seen[0].tokens_per_expert.sum() == mask.sum()


def test_enforced_and_dense_routing_choose_nothing():
    model = nn.Sequential(MoEMLP(4, 6, 3, routing="enforced"), MoEMLP(4, 6, 3, routing="dense"))
    ids = torch.tensor([0, 2])
    choices = RoutingChoices(model)
    for block in (choices.capturing(), choices.replaying()):
        with block:
            y = model[1](model[0](torch.ones(2, 4), expert_ids=ids))
    assert torch.equal(y, model[1](model[0](torch.ones(2, 4), expert_ids=ids)))


def test_a_router_that_runs_twice_is_refused():
    model = TwoLayers()
    x, mask = texts(0)
    choices = RoutingChoices(model)
    with pytest.raises(RuntimeError, match="a router ran twice"), choices.capturing():
        model(x, mask)
        model(x, mask)
    model(x, mask)  # nothing is left open


def test_a_copy_of_the_model_is_another_model():
    model = TwoLayers()
    (x, mask), (other, _) = texts(0), texts(1)
    choices = RoutingChoices(model)
    copied = copy.deepcopy(model)
    expected = index_of(copied, other, mask)
    with choices.capturing():
        model(x, mask)
    with choices.replaying():
        assert torch.equal(index_of(copied, other, mask), expected)
