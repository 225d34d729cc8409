"""The native route, against the reference in float64 on the same rounded inputs.

``test_route.py`` is the specification; it meets this backend wherever its inputs are float32 or
narrower. Here is what depends on the kernel: experts taken four at a time, rows converted, threads.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import ops

from .helpers import (
    DTYPES,
    assert_close,
    assert_gradients_close,
    assert_says,
    gradients,
    leaves,
    need_native_library,
    num_threads,
    opcheck_calls,
    property_test,
)

need_native_library()

MODES = ["token_topk", "sentence_topk", "dense"]
WEIGHT_MODES = ["renormalize", "probability", "straight_through", "one"]
# Sums of D = 33 products of unit scale in float32, then a softmax: a few roundings of 6e-8.
EXACT = 5e-6
# From here on several threads share the tokens: see grain() in route.cpp.
MANY_TOKENS, MANY_DIMS = 4100, 128


def problem(tokens=23, dim=33, experts=5, dtype=torch.float32, masked=False) -> tuple[dict, dict]:
    """Leaves, and where three sentences start; padding's rows are NaN."""
    x = torch.randn(tokens, dim).to(dtype)
    cuts = torch.tensor([0, tokens // 3, tokens // 2, tokens])
    mask = torch.rand(tokens) < 0.7 if masked else None
    if mask is not None:
        x[~mask] = torch.nan
    inputs = leaves(x=x, router_weight=torch.randn(experts, dim).to(dtype))
    return inputs, dict(cu_seqlens=cuts, token_mask=mask)


def assert_right(inputs: dict, **kwargs) -> None:
    """Results and gradients are the reference's in float64, gradients rounded to their dtype."""
    exact = leaves(**{name: t.detach().double() for name, t in inputs.items()})
    ours = ops.route(**inputs, **kwargs, backend="cpp")
    theirs = ops.route(**exact, **kwargs, backend="torch")
    assert torch.equal(ours.top_k_index, theirs.top_k_index)
    assert torch.equal(ours.tokens_per_expert, theirs.tokens_per_expert)
    assert_close(ours.top_k_weights, theirs.top_k_weights, EXACT, "top_k_weights")
    assert_close(ours.router_logits, theirs.router_logits, EXACT, "router_logits")
    outputs = [(r.top_k_weights, r.router_logits) for r in (ours, theirs)]
    upstream = [torch.randn_like(t) for t in outputs[0]]
    expected = gradients(outputs[1], upstream, exact)
    tolerance = max(2 * EXACT, 2 * torch.finfo(inputs["x"].dtype).eps)
    assert_gradients_close(gradients(outputs[0], upstream, inputs), expected, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weight_mode", WEIGHT_MODES)
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_reference(mode, weight_mode, masked, dtype):
    inputs, where = problem(dtype=dtype, masked=masked)
    weight_mode = "auto" if mode == "dense" else weight_mode
    assert_right(inputs, num_experts_per_tok=2, mode=mode, weight_mode=weight_mode, **where)


@property_test
@given(
    tokens=st.sampled_from([0, 1, 2, 5, 40]),
    dim=st.sampled_from([1, 3, 16, 17, 100]),
    experts=st.sampled_from([1, 2, 3, 4, 6, 8, 9, 70]),
    k=st.integers(1, 70),
    mode=st.sampled_from(MODES),
    weight_mode=st.sampled_from(WEIGHT_MODES),
    masked=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_shape(tokens, dim, experts, k, mode, weight_mode, masked, seed):
    torch.manual_seed(seed)
    inputs, where = problem(tokens, dim, experts, masked=masked)
    weight_mode = "auto" if mode == "dense" else weight_mode
    k = min(k, experts)
    assert_right(inputs, num_experts_per_tok=k, mode=mode, weight_mode=weight_mode, **where)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_many_tokens(mode, threads):
    inputs, where = problem(MANY_TOKENS, MANY_DIMS, 8, masked=True)
    with num_threads(threads):
        assert_right(inputs, num_experts_per_tok=2, mode=mode, **where)


@pytest.mark.parametrize("experts", [5, 6, 7, 9])
def test_equal_rows_of_the_weight_tie_wherever_they_stand(experts):
    """Experts go four at a time, the last four padded: no row may be summed in another order."""
    x, row = torch.randn(50, 101), torch.randn(101)
    routing = ops.route(x, row.repeat(experts, 1), 2, backend="cpp")
    assert (routing.router_logits == routing.router_logits[:, :1]).all()
    assert (routing.top_k_index == torch.tensor([0, 1])).all()


def test_a_token_routes_alike_in_any_company():
    x, w = torch.randn(MANY_TOKENS, MANY_DIMS), torch.randn(8, MANY_DIMS)
    with num_threads(3):
        together = ops.route(x, w, 2, backend="cpp")
    for t in (0, 1, MANY_TOKENS // 3, MANY_TOKENS - 1):
        alone = ops.route(x[t : t + 1], w, 2, backend="cpp")
        assert torch.equal(alone.router_logits[0], together.router_logits[t])


def test_the_first_bad_token_is_named():
    x = torch.randn(MANY_TOKENS, MANY_DIMS)
    x[3000, 5], x[1234, 7] = torch.inf, torch.nan
    with num_threads(3), pytest.raises(ValueError) as error:
        ops.route(x, torch.randn(3, MANY_DIMS), 1, backend="cpp")
    assert_says(error, "router logits", "nan", "token 1234")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode, dtype):
    inputs, where = problem(dtype=dtype)

    def call():
        routing = ops.route(**inputs, num_experts_per_tok=2, mode=mode, **where, backend="cpp")
        (routing.top_k_weights.square().sum() + routing.router_logits.square().sum()).backward()

    opcheck_calls(call, {"route_cpp", "route_cpp_backward"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(x=torch.randn(4, 3, 2)), "[T, D]"),
        (dict(x=torch.randn(4, 3).double()), "float32"),
        (dict(router_weight=torch.randn(5, 4)), "router_weight"),
        (dict(router_weight=torch.randn(3, 5).t()), "contiguous"),
        (dict(k=0), "num_experts_per_tok"),
        (dict(k=6), "num_experts_per_tok"),
        (dict(mode="enforced"), "mode"),
        (dict(mode="sentence_topk"), "cu_seqlens"),
        (dict(weight_mode="auto"), "weight_mode"),
        (dict(mask=torch.ones(3, dtype=torch.bool)), "token_mask"),
        (dict(mask=torch.ones(4)), "token_mask"),
        (dict(starts=torch.tensor([0, 5])), "cu_seqlens"),
        (dict(starts=torch.tensor([0, 4], dtype=torch.int32)), "int64"),
    ],
)
def test_the_kernel_refuses_what_it_cannot_use(change, says):
    arguments = dict(
        x=torch.randn(4, 3),
        router_weight=torch.randn(5, 3),
        k=2,
        mode="token_topk",
        weight_mode="renormalize",
        mask=None,
        starts=None,
    )
    with pytest.raises(RuntimeError) as error:
        torch.ops.moe_fast_cpp.route(*(arguments | change).values())
    assert_says(error, says)
