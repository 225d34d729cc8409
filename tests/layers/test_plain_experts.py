"""Experts in plain operators: the same as MoEMLP, for every routing, target and activation."""

import pytest
import torch

from moe_fast import MoEMLP
from moe_fast.layers import RoutingInfo
from moe_fast.layers.plain_experts import PlainMoEMLP, to_plain_experts
from moe_fast.ops.activations import ACTIVATIONS

D, H, E, B, L = 6, 10, 4, 3, 7
ROUTINGS = [
    ("enforced", 1, "auto"),
    ("dense", 1, "auto"),
    ("sentence_switch", 1, "auto"),
    *(
        (mode, k, kind)
        for mode in ("token_topk", "sentence_topk")
        for k in (1, 3)
        for kind in ("straight_through", "probability", "renormalize", "one")
    ),
]


def made(**settings):
    torch.manual_seed(0)
    return MoEMLP(D, H, E, **{"dtype": torch.float64, **settings}).eval()


def info_of(routing, masked=True):
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[1, 4:] = False
    ids = torch.tensor([2, 0, 3]) if routing == "enforced" else None
    return RoutingInfo(ids, mask if masked else None)


@pytest.mark.filterwarnings("ignore:weight_mode='renormalize'")
@pytest.mark.parametrize("target", ["mlp", "intermediate", "output"])
@pytest.mark.parametrize(("routing", "k", "kind"), ROUTINGS)
def test_it_is_the_mixture(routing, k, kind, target):
    mlp = made(routing=routing, num_experts_per_tok=k, weight_mode=kind, target=target)
    x = torch.randn(B, L, D, dtype=torch.float64)
    for masked in (True, False):
        info = info_of(routing, masked)
        want = mlp(x, routing=info)
        got = PlainMoEMLP(mlp)(x, routing=info)
        assert (got - want).norm() <= 1e-12 * want.norm()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation(act, gated):
    for bias, shared in ((True, False), (False, False), (True, True)):
        mlp = made(hidden_act=act, gated=gated, bias=bias, shared_bias=shared)
        if shared:
            torch.nn.init.normal_(mlp.output_bias)
        x = torch.randn(B, L, D, dtype=torch.float64)
        want = mlp(x, routing=info_of("token_topk"))
        got = PlainMoEMLP(mlp)(x, routing=info_of("token_topk"))
        assert (got - want).norm() <= 1e-12 * want.norm()


def test_ids_may_be_of_tokens():
    mlp = made(routing="enforced")
    x = torch.randn(B, L, D, dtype=torch.float64)
    info = RoutingInfo(torch.randint(0, E, (B, L)))
    torch.testing.assert_close(PlainMoEMLP(mlp)(x, routing=info), mlp(x, routing=info))


def test_padding_may_hold_anything():
    mlp = made()
    x = torch.randn(B, L, D, dtype=torch.float64)
    info = info_of("token_topk")
    want = PlainMoEMLP(mlp)(x, routing=info)
    x[1, 4:] = torch.nan
    torch.testing.assert_close(PlainMoEMLP(mlp)(x, routing=info), want)


def test_weights_are_shared_and_the_state_is_kept():
    block = torch.nn.ModuleDict({"mlp": made(), "other": torch.nn.Linear(2, 2)})
    stack = block["mlp"].down_proj
    to_plain_experts(block)
    plain = block["mlp"]
    assert type(plain) is PlainMoEMLP and not plain.training
    assert plain.down_proj[2].weight.data_ptr() == stack[2].data_ptr()
    with pytest.raises(ValueError, match="cannot be initialised"):
        plain.reset_parameters()
