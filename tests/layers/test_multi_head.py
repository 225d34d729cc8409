"""The multi-head block, compared with the oracle one head of one token at a time."""

import pytest
import torch

from moe_fast import MoEMultiHeadMLP
from moe_fast.layers import RoutingInfo
from moe_fast.layers.moe_mlp import OutputBlock
from tests.ops import oracle
from tests.ops.helpers import assert_close, assert_gradients_close

E = 3
ROUTINGS = [
    {},
    {"num_experts_per_tok": 2},
    {"num_experts_per_tok": 2, "weight_mode": "renormalize"},
    {"routing": "sentence_topk", "num_experts_per_tok": 2},
    {"routing": "sentence_switch"},
    {"routing": "dense"},
    {"routing": "enforced"},
]


def block(size=6, hidden=10, heads=2, **settings):
    torch.manual_seed(0)
    settings = {"num_experts_per_tok": 1, "dtype": torch.float64, **settings}
    return MoEMultiHeadMLP(size, hidden, E, num_heads=heads, **settings)


def by_the_oracle(mlp, x, mask, expert_ids, gated):
    """x [B, L, D]; each sub-token is a token of its own, in the order of heads."""
    batch, length, _ = x.shape
    n, h = mlp.num_heads, mlp.hidden_size
    subs = []
    for token in x.reshape(batch * length, -1):
        lifted = mlp.head_in.weight @ token + mlp.head_in.bias
        subs += [lifted[i * h : (i + 1) * h] for i in range(n)]
    subs = torch.stack(subs)
    real = torch.tensor([m for m in mask.flatten().tolist() for _ in range(n)])
    ids = expert_ids
    if ids is not None and ids.dim() == 2:
        ids = torch.tensor([e for e in ids.flatten().tolist() for _ in range(n)]).view(batch, -1)
    mode, weight_mode = mlp.router.mode, mlp.router.weight_mode
    routed = oracle.route(
        subs.view(batch, length * n, h),
        mlp.router.weight,
        mlp.num_experts_per_tok,
        mode=mode,
        weight_mode=weight_mode,
        expert_ids=ids,
        token_mask=real.view(batch, -1),
        num_experts=E,
    )
    up, up_bias = mlp.projection(mlp.up_name)
    down, down_bias = mlp.projection("down_proj")
    mixed = oracle.expert_mlp(
        subs,
        up,
        down,
        up_bias,
        down_bias,
        routed.top_k_weights,
        routed.top_k_index,
        gated=gated,
    )
    rows = []
    for t in range(batch * length):
        side_by_side = torch.cat([mixed[t * n + i] for i in range(n)])
        rows.append(mlp.head_out.weight @ side_by_side + mlp.head_out.bias)
    return torch.stack(rows).view(x.shape), routed


def problem(mlp, per_token=False):
    x = torch.randn(2, 4, mlp.model_size, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    ids = None
    if mlp.router.mode == "enforced":
        ids = torch.tensor([[0, 2, 1, 1], [2, 0, 0, 0]]) if per_token else torch.tensor([2, 0])
    return x, mask, ids


@pytest.mark.parametrize("sizes", [(6, 10, 2), (7, 11, 3), (5, 4, 1)], ids=str)
@pytest.mark.parametrize("settings", ROUTINGS, ids=str)
@pytest.mark.parametrize(("gated", "bias"), [(False, True), (True, False)])
def test_equals_the_oracle_with_its_gradients(sizes, settings, gated, bias):
    mlp = block(*sizes, gated=gated, bias=bias, **settings)
    x, mask, ids = problem(mlp)
    got = mlp(x, token_mask=mask, expert_ids=ids)
    want, _ = by_the_oracle(mlp, x, mask, ids, gated)
    assert_close(got, want)
    inputs = {"x": x, **dict(mlp.named_parameters())}
    upstream = torch.randn_like(want)
    grads = []
    for y in (got, want):
        found = torch.autograd.grad(y, inputs.values(), upstream, allow_unused=True)
        grads.append(dict(zip(inputs, found, strict=True)))
    missing = [name for name, grad in grads[1].items() if grad is None]
    assert not missing
    assert_gradients_close(*grads)


def test_a_learned_choice_keeps_its_probabilities():
    mlp = block(num_experts_per_tok=2)
    assert mlp.router.weight_mode == "probability"
    x, mask, _ = problem(mlp)
    _, routed = by_the_oracle(mlp, x, mask, None, False)
    sums = routed.top_k_weights.sum(1)[mask.repeat_interleave(2, 1).flatten()]
    assert (sums < 0.999).all()
    mlp(x, token_mask=mask).pow(2).sum().backward()
    assert mlp.router.weight.grad.abs().max() > 1e-6


@pytest.mark.parametrize("settings", ROUTINGS, ids=str)
def test_packed_equals_padded(settings):
    mlp = block(**settings)
    for per_token in (False, True) if settings.get("routing") == "enforced" else (False,):
        x, mask, ids = problem(mlp, per_token)
        want = mlp(x, token_mask=mask, expert_ids=ids)[mask]
        starts = torch.tensor([0, 4, 6])
        packed_ids = ids[mask] if per_token else ids
        for shape in ((6, -1), (1, 6, -1)):
            got = mlp(x[mask].view(*shape), cu_seqlens=starts, expert_ids=packed_ids)
            assert_close(got.view(6, -1), want)


def test_padding_is_not_seen():
    mlp = block()
    x, mask, _ = problem(mlp)
    clean = mlp(x, token_mask=mask)
    dirty = x.detach().clone()
    dirty[~mask] = float("nan")
    got = mlp(dirty, token_mask=mask)
    assert torch.equal(got, clean)
    assert torch.equal(got[~mask], mlp.head_out.bias.expand(2, -1))


def test_parameters_and_counts():
    mlp = block(7, 11, 3, num_experts_per_tok=2)
    assert {name: tuple(p.shape) for name, p in mlp.named_parameters()} == {
        "up_proj": (E, 3, 2),
        "up_proj_bias": (E, 3),
        "down_proj": (E, 2, 3),
        "down_proj_bias": (E, 2),
        "router.weight": (E, 2),
        "head_in.weight": (6, 7),
        "head_in.bias": (6,),
        "head_out.weight": (7, 6),
        "head_out.bias": (7,),
    }
    assert mlp.experts_per_token == 3  # of six visits at most
    assert "num_heads=3" in repr(mlp)


def test_bad_input():
    with pytest.raises(ValueError, match="num_heads must be at most hidden_size = 6 and"):
        block(heads=7)
    with pytest.raises((ValueError, TypeError), match="num_heads must be"):
        block(heads=0)
    mlp = block()
    x, mask, _ = problem(mlp)
    with pytest.raises(ValueError, match=r"hidden_states must end in hidden_size = 6"):
        mlp(x[..., :3])
    with pytest.raises(ValueError, match="output_block must be None in a multi-head block"):
        mlp(x, output_block=OutputBlock(x, x[0, 0], x[0, 0], 1e-5, 0.0))
    with pytest.raises(ValueError, match="not both"):
        mlp(x, routing=RoutingInfo(token_mask=mask), token_mask=mask)
