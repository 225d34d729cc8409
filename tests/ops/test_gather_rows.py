"""``ops.gather_rows`` on every backend, against the oracle in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import ops

from . import oracle
from .helpers import (
    DTYPES,
    TOLERANCES,
    assert_close,
    assert_says,
    num_threads,
    opcheck_calls,
    property_test,
)

BACKENDS = [b for b in ops.available_backends("gather_rows") if b != "triton"]
backends = pytest.mark.parametrize("backend", BACKENDS)
SKIPPED = torch.tensor([[0, 2], [2, 0], [1, 0], [2, 1], [2, 0], [3, 3]])  # as in RoutingPlan


def check(top_k_index, num_experts, dim, dtype, backend) -> None:
    """Rows exactly, and the gradient of x."""
    x = torch.randn(top_k_index.shape[0], dim).to(dtype).requires_grad_()
    rows = ops.gather_rows(x, ops.plan(top_k_index, num_experts), backend=backend)
    exact = x.detach().double().requires_grad_()
    expected = oracle.gather_rows(exact, top_k_index, num_experts)
    assert rows.dtype == dtype
    assert torch.equal(rows.double(), expected)  # copies: no rounding
    upstream = torch.randn(rows.shape).to(dtype)
    (grad,) = torch.autograd.grad(rows, x, upstream)
    if expected.requires_grad:
        (expected_grad,) = torch.autograd.grad(expected, exact, upstream.double())
        assert_close(grad, expected_grad, TOLERANCES[dtype], "gradient of x")


@backends
@property_test
@given(
    tokens=st.sampled_from([0, 1, 2, 15, 97]),
    k=st.integers(1, 4),
    experts=st.sampled_from([1, 2, 3, 7, 16]),
    dim=st.sampled_from([1, 2, 7, 16, 33, 130]),
    dtype=st.sampled_from([torch.float64, *DTYPES]),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 999),
)
def test_any_shape(backend, tokens, k, experts, dim, dtype, threads, seed):
    torch.manual_seed(seed)
    used = torch.randint(1, experts + 2, ()).item()  # some experts empty; E is drawn too: skipped
    with num_threads(threads):
        check(torch.randint(0, used, (tokens, k)), experts, dim, dtype, backend)


@backends
def test_enough_rows_for_every_thread(backend):
    with num_threads(3):
        check(torch.randint(0, 5, (701, 2)), 4, 64, torch.float32, backend)


@backends
def test_worked_example(backend):
    x = torch.arange(6.0)[:, None]
    rows = ops.gather_rows(x, ops.plan(SKIPPED, 3), backend=backend)
    assert rows.flatten().tolist() == [0, 1, 2, 4, 2, 3, 0, 1, 3, 4, 0, 0]


@backends
def test_skipped_tokens_leak_nothing(backend):
    x = torch.randn(6, 4)
    x[5] = float("nan")
    x.requires_grad_()
    rows = ops.gather_rows(x, ops.plan(SKIPPED, 3), backend=backend)
    assert (rows[10:] == 0).all() and rows.isfinite().all()
    upstream = torch.ones(12, 4)
    upstream[10:] = float("nan")
    (grad,) = torch.autograd.grad(rows, x, upstream)
    assert (grad[5] == 0).all() and torch.equal(grad[:5], torch.full((5, 4), 2.0))


@backends
def test_strides_and_autocast(backend):
    x = torch.randn(4, 6).t()
    plan = ops.plan(SKIPPED, 3)
    with torch.autocast("cpu", torch.bfloat16):
        rows = ops.gather_rows(x, plan, backend=backend)
    assert torch.equal(rows, ops.gather_rows(x.contiguous(), plan, backend="torch"))
    leaf = x.detach().requires_grad_()
    ops.gather_rows(leaf, plan, backend=backend).sum().backward()  # a gradient of stride 0
    assert leaf.grad[:5].eq(2).all()


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(backend, dtype):
    x = torch.randn(6, 5).to(dtype).requires_grad_()
    plan = ops.plan(SKIPPED, 3)
    ending = "" if backend == "torch" else f"_{backend}"
    opcheck_calls(
        lambda: ops.gather_rows(x, plan, backend=backend).cumsum(0).sum().backward(),
        {f"gather_rows{ending}", f"combine_rows{ending}"},
    )


@backends
def test_compiles_as_one_graph(backend):
    torch.compiler.reset()

    def function(ids, x):
        return ops.gather_rows(x, ops.plan(ids, 3), backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (7, 12):
        ids, x = torch.randint(0, 4, (tokens, 2)), torch.randn(tokens, 3)
        assert torch.equal(compiled(ids, x), function(ids, x))


@pytest.mark.parametrize(
    ("x", "error", "fragments"),
    [
        (torch.zeros(6), ValueError, ["x", "[T, D]", "[6]"]),
        (torch.zeros(5, 3), ValueError, ["plan", "5", "12"]),
        (torch.zeros(0, 3), ValueError, ["plan", "0", "12"]),
        (torch.zeros(6, 3, dtype=torch.int64), TypeError, ["x", "float32", "int64"]),
        (torch.zeros(6, 3, device="meta"), ValueError, ["expert_offsets", "meta", "cpu"]),
    ],
)
def test_refuses(x, error, fragments):
    with pytest.raises(error) as caught:
        ops.gather_rows(x, ops.plan(SKIPPED, 3))
    assert_says(caught, *fragments)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the native library is not built: make setup")
@pytest.mark.parametrize(
    ("field", "value", "fragments"),
    [
        ("row_to_token", 6, ["plan.row_to_token", "6"]),
        ("row_to_token", -1, ["plan.row_to_token", "-1"]),
        ("expert_offsets", 13, ["plan.expert_offsets", "12", "13"]),
        ("expert_offsets", -1, ["plan.expert_offsets", "-1"]),
    ],
)
def test_a_plan_that_is_none_is_refused(field, value, fragments):
    plan = ops.plan(SKIPPED, 3)
    getattr(plan, field)[-3 if field == "row_to_token" else -1] = value
    with pytest.raises(ValueError) as caught:
        ops.gather_rows(torch.zeros(6, 3), plan, backend="cpp")
    assert_says(caught, *fragments)
