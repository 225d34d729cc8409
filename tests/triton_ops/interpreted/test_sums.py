"""Combine and the output block behind it, gradients of biases and router, sums, the plan."""

from __future__ import annotations

import pytest
import torch
from moe_fast.triton_ops.column_sum import column_sum
from moe_fast.triton_ops.combine import combine
from moe_fast.triton_ops.combine_norm import combine_norm, combine_norm_backward
from moe_fast.triton_ops.grouped_mm import zero_empty
from moe_fast.triton_ops.plan import plan
from moe_fast.triton_ops.router_grad import router_grad
from moe_fast.triton_ops.split_sum import split_sum

from tests.ops import oracle
from tests.ops.helpers import TOLERANCES, assert_close

from .rows import guarded, sorted_rows

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COUNTS = [0, 17, 1, 130, 0, 4]


def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return guarded(torch.randn(shape, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine(dtype, k, weighted):
    rows = sorted_rows(COUNTS, skipped=8, k=k)
    values = new(len(rows.row_to_slot), 131, dtype=dtype)
    values[rows.offsets[-1] :] = float("nan")
    weights = guarded(torch.rand(len(values) // k, k)) if weighted else None
    y = combine(values, rows.slot_to_row, weights, k)
    expected = torch.zeros(len(values) // k, 131, dtype=torch.float64)
    for slot, row in enumerate(rows.slot_to_row.tolist()):
        if row >= 0:
            weight = 1.0 if weights is None else weights.view(-1)[slot].double()
            expected[slot // k] += weight * values[row].double()
    assert_close(y, expected, TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("dtype", "k", "drops", "n"),  # 1030 columns leave one token to a step of a program
    [
        (torch.float64, 1, True, 131),
        (torch.float64, 3, False, 1030),
        (torch.float32, 1, False, 131),
        (torch.bfloat16, 2, True, 131),
        (torch.bfloat16, 1, False, 3),
        (torch.float16, 2, True, 131),
    ],
)
def test_combine_norm(dtype, k, drops, n, monkeypatch):
    monkeypatch.setattr("moe_fast.triton_ops.combine_norm._MOST_RUNS", 3)
    rows = sorted_rows([0, 17, 1, 33, 0], skipped=9, k=k)
    tokens, eps, scale = len(rows.row_to_slot) // k, 1e-5, 1.25
    values = new(tokens * k, n, dtype=dtype)
    values[rows.offsets[-1] :] = float("nan")
    weights = guarded(torch.rand(tokens, k))
    # The residual may be wider than the rows, as under autocast.
    wide = torch.float32 if dtype == torch.float16 else dtype
    residual, gamma, beta = (new(*s, dtype=wide) for s in ((tokens, n), (n,), (n,)))
    keep = torch.rand(tokens, n) < 0.8 if drops else None
    y = torch.zeros(tokens, n, dtype=torch.float64)
    for slot, row in enumerate(rows.slot_to_row.tolist()):
        if row >= 0:
            y[slot // k] += weights.view(-1)[slot].double() * values[row].double()
    leaves = [t.double().requires_grad_() for t in (y, residual, gamma, beta)]
    dropped = leaves[0] if keep is None else leaves[0] * keep * scale
    expected = torch.nn.functional.layer_norm(dropped + leaves[1], (n,), *leaves[2:], eps)

    block = (residual, keep, gamma, beta)
    out, total, moments = combine_norm(
        values, rows.slot_to_row, weights, *block, scale=scale, eps=eps, save=True
    )
    assert out.dtype == total.dtype == wide
    assert_close(out, expected, TOLERANCES[wide], "out")
    upstream = new(tokens, n, dtype=wide)
    grads = torch.autograd.grad(expected, leaves, upstream.double())
    actual = combine_norm_backward(upstream, total, moments, keep, gamma, scale=scale, like=values)
    for ours, theirs, name in zip(actual, grads, ("y", "residual", "gamma", "beta"), strict=True):
        assert_close(ours, theirs, TOLERANCES[dtype if name == "y" else wide], name)
    alone = combine_norm(
        values, rows.slot_to_row, weights, *block, scale=scale, eps=eps, save=False
    )
    assert torch.equal(alone[0], out)
    assert alone[1].numel() == alone[2].numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_column_sum(dtype):
    rows = sorted_rows(COUNTS, skipped=8, k=2)
    a = new(len(rows.row_to_slot) // 2, 70, dtype=dtype)
    weights = guarded(torch.rand(len(rows.row_to_slot)))
    expected = torch.zeros(len(COUNTS), 70, dtype=torch.float64)
    for r, e in enumerate(rows.expert):
        weight = weights[rows.row_to_slot[r]].double()
        expected[e] += weight * a[rows.row_to_token[r]].double()
    assert_close(column_sum(a, weights, rows.plan), expected, TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("parts", "dot", "bias"), [(3, False, True), (0, True, True), (1, True, False)]
)
@pytest.mark.parametrize("dtype", DTYPES[::2])
def test_router_grad(dtype, parts, dot, bias):
    rows = sorted_rows(COUNTS, skipped=8, k=2)
    size = len(rows.row_to_slot)
    acc = torch.promote_types(dtype, torch.float32)
    partial = guarded(torch.randn(parts, size, dtype=acc)) if parts else None
    u, v = new(size, 133, dtype=dtype), new(size // 2, 133, dtype=dtype)
    grad, b = new(size // 2, 19, dtype=dtype), new(len(COUNTS), 19, dtype=dtype)
    top_k_weights = torch.rand(size // 2, 2)
    actual = router_grad(
        partial, (u, v) if dot else None, grad, b if bias else None, top_k_weights, rows.plan
    )
    expected = torch.zeros(size, dtype=torch.float64)
    for r, e in enumerate(rows.expert):
        token, slot = rows.row_to_token[r], rows.row_to_slot[r]
        expected[slot] = 0.0 if partial is None else partial[:, r].double().sum()
        if dot:
            expected[slot] += u[r].double() @ v[token].double()
        if bias:
            expected[slot] += grad[token].double() @ b[e].double()
    assert_close(actual.view(-1), expected, 1e-5)  # float32 sums of the rounded inputs
    assert (actual.view(-1)[rows.slot_to_row < 0] == 0).all()


def test_zero_empty_writes_where_an_expert_has_no_rows():
    out = torch.full((4, 31, 40), float("nan"))  # what a product left there
    out[1::2] = 7
    zero_empty(out, torch.tensor([0, 0, 3, 3, 9]))
    assert (out[0::2] == 0).all()
    assert (out[1::2] == 7).all()


def test_split_sum_adds_integers_too():
    partial = torch.randint(0, 9, (5, 3, 700))
    assert torch.equal(split_sum(partial, partial.new_zeros(3, 700)), partial.sum(0))


@pytest.mark.parametrize("num_experts", [1, 2, 7, 8, 200])
@pytest.mark.parametrize(("tokens", "k"), [(0, 1), (1, 1), (601, 2)])
def test_plan_over_several_blocks(num_experts, tokens, k):
    """200 experts leave 32 slots to a block: 38 of them, more than step 2 takes at a time."""
    ids = torch.randint(-1, num_experts + 3, (tokens, k))
    expected = oracle.plan(torch.where(ids < 0, num_experts, ids), num_experts)
    offsets, row_to_token, row_to_slot, slot_to_row = plan(ids, num_experts)
    assert offsets.tolist() == expected.expert_offsets
    assert row_to_token.tolist() == expected.row_to_token
    assert row_to_slot.tolist() == expected.row_to_slot
    assert slot_to_row.tolist() == expected.slot_to_row
