"""MoEMLP: parameters, forward for every target, routing in parts or as one object."""

import pytest
import torch
import torch.nn.functional as F

from moe_fast import MoEMLP
from moe_fast.layers import RoutingInfo
from moe_fast.layers.moe_mlp import OutputBlock

D, H, E = 6, 10, 3


def _mlp(**settings):
    torch.manual_seed(0)
    return MoEMLP(D, H, E, **{"num_experts_per_tok": 2, "dtype": torch.float64, **settings})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("target", ["mlp", "intermediate", "output"])
def test_parameter_names_and_shapes(target, gated, bias):
    mlp = _mlp(target=target, gated=gated, bias=bias)
    up, rows = ("gate_up_proj", 2 * H) if gated else ("up_proj", H)
    stack = {name: (E,) if mlp.is_expert(name) else () for name in (up, "down_proj")}
    want = {
        up: (*stack[up], rows, D),
        "down_proj": (*stack["down_proj"], D, H),
        "router.weight": (E, H if target == "output" else D),
    }
    if bias:
        want |= {f"{up}_bias": (*stack[up], rows), "down_proj_bias": (*stack["down_proj"], D)}
    assert {name: tuple(p.shape) for name, p in mlp.named_parameters()} == want
    replicated = [n for n in (up, "down_proj") if target == "mlp" or mlp.is_expert(n)]
    assert {n.removesuffix("_bias") for n, _ in mlp.expert_parameters()} == set(replicated)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("target", ["mlp", "intermediate", "output"])
def test_forward_is_the_weighted_sum_over_experts(target, gated):
    mlp = _mlp(target=target, gated=gated)
    x = torch.randn(5, D, dtype=torch.float64)

    def weight(name, e):
        value, bias = mlp.projection(name)
        return (value[e], bias[e]) if mlp.is_expert(name) else (value, bias)

    def activate(z):
        return F.gelu(z[:H]) * z[H:] if gated else F.gelu(z)

    want = []
    for row in x:
        router_input = row
        if target == "output":
            router_input = activate(F.linear(row, *weight(mlp.up_name, 0)))
        top = (mlp.router.weight @ router_input).topk(2)
        y = torch.zeros(H * (1 + gated) if target == "intermediate" else D, dtype=row.dtype)
        for p, e in zip(top.values.softmax(0), top.indices.tolist(), strict=True):
            z = F.linear(row, *weight(mlp.up_name, e))
            if target != "intermediate":
                z = F.linear(activate(z), *weight("down_proj", e))
            y = y + p * z
        if target == "intermediate":
            y = F.linear(activate(y), *weight("down_proj", 0))
        want.append(y)
    torch.testing.assert_close(mlp(x), torch.stack(want), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
def test_shared_bias_stands_behind_the_sum(gated):
    mlp = _mlp(shared_bias=True, gated=gated, weight_mode="probability")
    plain = _mlp(bias=False, gated=gated, weight_mode="probability")
    assert set(mlp.state_dict()) == {*plain.state_dict(), "output_bias"}
    assert not mlp.output_bias.any()
    with torch.no_grad():
        mlp.output_bias += torch.arange(1.0, D + 1)
    plain.load_state_dict(mlp.state_dict(), strict=False)
    x = torch.randn(2, 3, D, dtype=torch.float64)
    mask = torch.tensor([[True] * 3, [True, False, False]])
    got = mlp(x, token_mask=mask)
    assert torch.equal(got, plain(x, token_mask=mask) + mlp.output_bias)
    assert torch.equal(got[1, 2], mlp.output_bias)
    got.sum().backward()
    assert torch.equal(mlp.output_bias.grad, torch.full((D,), 6.0, dtype=torch.float64))
    assert {name for name, _ in mlp.expert_parameters()} == {mlp.up_name, "down_proj"}
    half = mlp.to(torch.bfloat16)
    half.output_bias.data = half.output_bias.float()  # as under autocast
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_shared_bias_refuses_what_it_cannot_go_with():
    with pytest.raises(ValueError, match="shared_bias must be False unless .*target='output'"):
        _mlp(shared_bias=True, target="output")
    x = torch.randn(2, D, dtype=torch.float64)
    block = OutputBlock(x, x[0], x[0], 1e-5, 0.0)
    with pytest.raises(ValueError, match="output_block must be None with shared_bias=True"):
        _mlp(shared_bias=True)(x, output_block=block)


def test_padded_batch_equals_packed_batch():
    mlp = _mlp(routing="sentence_topk")
    x = torch.randn(2, 4, D, dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    packed = mlp(x[mask], cu_seqlens=torch.tensor([0, 4, 6]))
    torch.testing.assert_close(mlp(x, token_mask=mask)[mask], packed, rtol=1e-12, atol=1e-12)
    # transformers packs as [1, T, D]
    one_row = mlp(x[mask][None], cu_seqlens=torch.tensor([0, 4, 6]))
    assert torch.equal(one_row[0], packed)


def test_padding_gives_zero_whatever_it_holds():
    mlp = _mlp()
    x = torch.randn(2, 4, D, dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    clean = mlp(x, token_mask=mask)
    x[~mask] = float("nan")
    assert torch.equal(mlp(x, token_mask=mask), clean)
    assert not clean[~mask].any()


def test_routing_in_parts_or_as_one_object():
    mlp = _mlp(routing="enforced", num_experts_per_tok=1)
    x = torch.randn(2, 4, D, dtype=torch.float64)
    ids = torch.tensor([2, 0])
    want = mlp(x, expert_ids=ids)
    info = RoutingInfo(expert_ids=ids)
    assert torch.equal(mlp(x, routing=info), want)
    assert torch.equal(mlp(x, routing=info.with_shared_plan(E, x)), want)
    with pytest.raises(ValueError, match="give routing or expert_ids, not both"):
        mlp(x, routing=info, expert_ids=ids)
    with pytest.raises(TypeError, match=r"routing must be a RoutingInfo\(.*\); got dict"):
        mlp(x, routing={})


@pytest.mark.parametrize("routing", ["token_topk", "dense", "enforced"])
def test_empty_input_gives_empty_output(routing):
    mlp = _mlp(routing=routing, num_experts_per_tok=1)
    ids = torch.zeros(0, dtype=torch.long) if routing == "enforced" else None
    x = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    y = mlp(x, expert_ids=ids)
    assert y.shape == (0, D)
    y.sum().backward()
    assert not mlp.up_proj.grad.any()


@pytest.mark.parametrize(
    ("routing", "target"),
    [
        ("token_topk", "mlp"),
        ("sentence_topk", "intermediate"),
        ("sentence_topk", "mlp"),
        ("dense", "mlp"),
        ("enforced", "output"),
        ("enforced", "mlp"),
    ],
)
def test_compiles_as_one_graph(routing, target):
    torch._dynamo.reset()
    mlp = _mlp(routing=routing, target=target, num_experts_per_tok=1)
    x = torch.randn(2, 4, D, dtype=torch.float64)
    extra = {"expert_ids": torch.tensor([2, 0])} if routing == "enforced" else {}
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    got = compiled(x, token_mask=torch.ones(2, 4, dtype=torch.bool), **extra)
    torch.testing.assert_close(got, mlp(x, **extra), rtol=1e-12, atol=1e-12)
    got.sum().backward()
    assert mlp.down_proj.grad is not None


@pytest.mark.slow
def test_compiles_with_inductor():
    torch._dynamo.reset()
    mlp = _mlp(dtype=torch.float32)
    x = torch.randn(2, 4, D, requires_grad=True)
    compiled = torch.compile(mlp, fullgraph=True)
    torch.testing.assert_close(compiled(x), mlp(x))
    compiled(x).sum().backward()
    assert x.grad is not None


LEARNED = [
    (routing, k, weight_mode)
    for routing, k in [
        ("token_topk", 1),
        ("token_topk", 2),
        ("sentence_topk", 2),
        ("sentence_switch", 1),
    ]
    for weight_mode in ("auto", "renormalize", "probability", "straight_through", "one")
] + [("dense", 1, "auto")]


@pytest.mark.filterwarnings("ignore:weight_mode='renormalize'")
@pytest.mark.parametrize(("routing", "k", "weight_mode"), LEARNED)
def test_the_task_trains_the_router_unless_its_weights_are_constant(routing, k, weight_mode):
    mlp = _mlp(routing=routing, num_experts_per_tok=k, weight_mode=weight_mode)
    mlp(torch.randn(2, 4, D, dtype=torch.float64)).pow(2).sum().backward()
    constant = weight_mode == "one" or (weight_mode == "renormalize" and k == 1)
    assert bool(mlp.router.weight.grad.any()) != constant


def test_a_constant_weight_warns():
    with pytest.warns(UserWarning, match="the task never trains the router"):
        _mlp(num_experts_per_tok=1, weight_mode="renormalize")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts_per_tok": 4}, "num_experts_per_tok must lie in 1 .. num_experts = 3; got 4"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must lie in 1 .. num_experts = 3; got 0"),
        ({"hidden_act": "cube"}, "hidden_act must be one of 'gelu'.*got 'cube'"),
        ({"target": "head"}, "target must be one of 'mlp', 'intermediate', 'output'; got 'head'"),
        ({"routing": "best"}, "routing must be one of 'token_topk'.*got 'best'"),
        ({"weight_mode": "x"}, "weight_mode must be one of 'auto'.*got 'x'"),
        ({"routing": "enforced"}, "num_experts_per_tok must be 1 with routing='enforced'; got 2"),
    ],
)
def test_bad_settings_name_the_argument(settings, message):
    with pytest.raises(ValueError, match=message):
        _mlp(**settings)


def test_input_of_another_width():
    with pytest.raises(ValueError, match=r"hidden_states must end in hidden_size = 6; got .*7\]"):
        _mlp()(torch.zeros(2, 7, dtype=torch.float64))
