"""``ops.combine_rows`` on every backend, against the oracle in float64."""

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
    assert_gradients_close,
    assert_says,
    gradients,
    leaves,
    num_threads,
    opcheck_calls,
    property_test,
)

BACKENDS = [b for b in ops.available_backends("combine_rows") if b != "triton"]
backends = pytest.mark.parametrize("backend", BACKENDS)
SKIPPED = torch.tensor([[0, 2], [2, 0], [1, 0], [2, 1], [2, 0], [3, 3]])  # as in RoutingPlan


def check(top_k_index, num_experts, dim, dtype, backend) -> None:
    """The sums, and the gradients of rows and weights."""
    rows = torch.randn(top_k_index.numel(), dim).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    actual = leaves(rows=rows, weights=torch.randn(top_k_index.shape).to(wide))
    plan = ops.plan(top_k_index, num_experts)
    y = ops.combine_rows(actual["rows"], actual["weights"], plan, backend=backend)
    exact = leaves(**{n: t.double() for n, t in actual.items()})
    expected = oracle.combine_rows(exact["rows"], exact["weights"], top_k_index, num_experts)
    assert y.dtype == dtype
    assert_close(y, expected, TOLERANCES[dtype], "y")
    upstream = [torch.randn(y.shape).to(dtype)]
    assert_gradients_close(
        gradients([y], upstream, actual),
        gradients([expected], upstream, exact),
        TOLERANCES[dtype],
    )


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
def test_undoes_gather_rows(backend):
    """Weights that sum to one over a token's rows give the token back."""
    x, plan = torch.randn(5, 4), ops.plan(SKIPPED[:5], 3)
    weights = torch.softmax(torch.randn(5, 2), -1)
    rows = ops.gather_rows(x, plan, backend=backend)
    assert_close(ops.combine_rows(rows, weights, plan, backend=backend), x, 1e-6)


@backends
def test_skipped_slots_leak_nothing(backend):
    """Neither their rows, nor their weights, nor what comes from above."""
    tensors = leaves(rows=torch.randn(12, 4), weights=torch.rand(6, 2))
    upstream = torch.randn(6, 4)
    with torch.no_grad():
        tensors["rows"][10:] = tensors["weights"][5] = upstream[5] = float("nan")
    y = ops.combine_rows(*tensors.values(), ops.plan(SKIPPED, 3), backend=backend)
    grads = gradients([y], [upstream], tensors)
    assert (y[5] == 0).all() and y.isfinite().all()
    assert (grads["rows"][10:] == 0).all() and grads["rows"].isfinite().all()
    assert (grads["weights"][5] == 0).all() and grads["weights"].isfinite().all()


@backends
def test_strides_and_autocast(backend):
    rows, weights, plan = torch.randn(4, 12).t(), torch.rand(2, 6).t(), ops.plan(SKIPPED, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.combine_rows(rows, weights, plan, backend=backend)
    assert_close(y, oracle.combine_rows(rows.double(), weights.double(), SKIPPED, 3), 1e-6)


@backends
def test_two_runs_are_bitwise_equal(backend):
    ids = torch.randint(0, 4, (501, 3))
    tensors = leaves(rows=torch.randn(1503, 40), weights=torch.rand(501, 3))
    upstream, runs = torch.randn(501, 40), []
    with num_threads(3):
        for _ in range(2):
            y = ops.combine_rows(*tensors.values(), ops.plan(ids, 4), backend=backend)
            runs.append([y, *gradients([y], [upstream], tensors).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(backend, dtype):
    tensors = leaves(rows=torch.randn(12, 5).to(dtype), weights=torch.rand(6, 2))
    plan = ops.plan(SKIPPED, 3)
    ending = "" if backend == "torch" else f"_{backend}"
    opcheck_calls(
        lambda: (
            ops.combine_rows(*tensors.values(), plan, backend=backend).cumsum(0).sum().backward()
        ),
        {f"combine_rows{ending}", f"combine_rows{ending}_backward"},
    )


@backends
def test_compiles_as_one_graph(backend):
    torch.compiler.reset()

    def function(ids, rows, weights):
        return ops.combine_rows(rows, weights, ops.plan(ids, 3), backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (7, 12):
        arguments = torch.randint(0, 4, (tokens, 2)), torch.randn(2 * tokens, 3)
        weights = torch.rand(tokens, 2)
        assert torch.equal(compiled(*arguments, weights), function(*arguments, weights))


@pytest.mark.parametrize(
    ("rows", "weights", "error", "fragments"),
    [
        (torch.zeros(12), torch.zeros(6, 2), ValueError, ["rows", "[T * K, D]", "[12]"]),
        (torch.zeros(11, 3), torch.zeros(6, 2), ValueError, ["rows", "12", "11"]),
        (torch.zeros(12, 3), torch.zeros(12), ValueError, ["top_k_weights", "[T, K]", "[12]"]),
        (torch.zeros(6, 3), torch.zeros(6, 1), ValueError, ["plan.slot_to_row", "6", "12"]),
        (torch.zeros(12, 3).int(), torch.zeros(6, 2), TypeError, ["rows", "float32", "int32"]),
        (torch.zeros(12, 3), torch.zeros(6, 2).half(), TypeError, ["top_k_weights", "float16"]),
    ],
)
def test_refuses(rows, weights, error, fragments):
    with pytest.raises(error) as caught:
        ops.combine_rows(rows, weights, ops.plan(SKIPPED, 3))
    assert_says(caught, *fragments)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the native library is not built: make setup")
@pytest.mark.parametrize("value", [12, -2, 0])  # out of bounds, and one row twice
def test_a_plan_that_is_none_is_refused(value):
    plan = ops.plan(SKIPPED, 3)
    plan.slot_to_row[3] = value
    with pytest.raises(ValueError) as caught:
        ops.combine_rows(torch.zeros(12, 3), torch.zeros(6, 2), plan, backend="cpp")
    assert_says(caught, "plan.slot_to_row", value, "at 3")
