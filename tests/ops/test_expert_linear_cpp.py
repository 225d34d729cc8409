"""``expert_linear`` on the ``cpp`` backend, against the reference in float64 on the same inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_fast import ops

from .helpers import (
    DTYPES,
    assert_close,
    leaves,
    need_native_library,
    num_threads,
    opcheck_calls,
    property_test,
)

need_native_library()

F32, BF16, F16 = DTYPES
NAMES = ["x", "weight", "bias", "top_k_weights"]
TOLERANCES = {F32: 1e-5, BF16: 2e-2, F16: 4e-3}  # as in test_expert_mlp_cpp.py


def problem(
    tokens=37, k=2, experts=3, inputs=32, outputs=48, *, bias=True, skip=True, dtype=F32, used=None
) -> tuple[dict, ops.RoutingPlan]:
    """Values of unit scale; ids below ``used``, some of them skipped if ``skip``."""
    tensors = dict(
        x=torch.randn(tokens, inputs).to(dtype),
        weight=(torch.randn(experts, outputs, inputs) / inputs**0.5).to(dtype),
        bias=torch.randn(experts, outputs).to(dtype) if bias else None,
        top_k_weights=torch.rand(tokens, k),
    )
    ids = torch.randint(0, used or experts, (tokens, k))
    if skip:
        ids = torch.where(torch.rand(tokens, k) < 0.2, experts, ids)
    return tensors, ops.plan(ids, experts)


def run(tensors: dict, plan: ops.RoutingPlan, upstream: Tensor, backend: str) -> dict:
    """The output and all gradients, by name."""
    inputs = leaves(**tensors)
    y = ops.expert_linear(*(inputs[n] for n in NAMES), plan, backend=backend)
    wanted = {n: t for n, t in inputs.items() if t is not None}
    grads = torch.autograd.grad(y, list(wanted.values()), upstream.to(y.dtype))
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_right(tensors: dict, plan: ops.RoutingPlan, upstream: Tensor | None = None) -> None:
    """Output and every gradient, in value and dtype."""
    dtype = tensors["x"].dtype
    if upstream is None:
        upstream = torch.randn(tensors["x"].shape[0], tensors["weight"].shape[1]).to(dtype)
    in_double = {n: None if t is None else t.double() for n, t in tensors.items()}
    actual, expected = run(tensors, plan, upstream, "cpp"), run(in_double, plan, upstream, "torch")
    for name in expected:
        assert actual[name].dtype == (dtype if name == "y" else tensors[name].dtype), name
        assert_close(actual[name], expected[name], TOLERANCES[dtype], name)


@property_test
@given(
    tokens=st.sampled_from([1, 2, 15, 97, 331]),
    k=st.sampled_from([1, 2, 99]),
    experts=st.sampled_from([1, 2, 3, 5, 6, 7, 8, 16]),
    inputs=st.sampled_from([1, 2, 7, 16, 33, 100, 210]),
    outputs=st.sampled_from([1, 6, 17, 48, 130, 300]),
    bias=st.booleans(),
    skip=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 999),
)
def test_any_shape(tokens, k, experts, inputs, outputs, bias, skip, dtype, threads, seed):
    torch.manual_seed(seed)
    k = min(k, experts)
    tensors, plan = problem(tokens, k, experts, inputs, outputs, bias=bias, skip=skip, dtype=dtype)
    with num_threads(threads):
        assert_right(tensors, plan)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_widths_of_models(dtype):
    """More rows, inputs and outputs than one block of each."""
    with num_threads(2):
        assert_right(*problem(1031, 1, 2, 384, 1000, dtype=dtype))
        assert_right(*problem(40, 2, 5, 1000, 768, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens(dtype):
    tensors, plan = problem(tokens=0, dtype=dtype)
    results = run(tensors, plan, torch.zeros(0, 48), "cpp")
    assert results["y"].shape == (0, 48)
    assert all(torch.equal(results[n], torch.zeros_like(tensors[n])) for n in NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_skipped_tokens_and_empty_experts_leak_nothing(dtype):
    tensors, _ = problem(dtype=dtype)
    ids = torch.randint(0, 2, (37, 2))
    skipped = torch.tensor([0, 5, 36])
    ids[skipped] = 3
    results = []
    for value in (0.0, float("nan"), float("inf")):
        dirty = tensors | dict(
            x=tensors["x"].index_fill(0, skipped, value),
            weight=tensors["weight"].index_fill(0, torch.tensor([2]), value),
            top_k_weights=tensors["top_k_weights"].index_fill(0, skipped, value),
        )
        upstream = torch.ones(37, 48).cumsum(0).index_fill(0, skipped, value)
        results.append(run(dirty, ops.plan(ids, 3), upstream, "cpp"))
    for name in results[0]:
        part = results[0][name][2 if name in ("weight", "bias") else skipped]
        assert (part == 0).all(), name
        assert all(torch.equal(results[0][name], r[name]) for r in results[1:]), name


def test_strides():
    tensors, plan = problem()
    assert_right(
        {n: t.movedim(-1, 0).contiguous().movedim(0, -1) for n, t in tensors.items()}, plan
    )
    assert_right(tensors, plan, torch.ones(()).expand(37, 48))


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_bitwise_equal(dtype):
    tensors, plan = problem(tokens=501, inputs=200, dtype=dtype)
    with num_threads(3):
        one, two = (run(tensors, plan, torch.ones(501, 48), "cpp") for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize(("bias", "dtype"), [(False, F32), (True, BF16), (True, F16)])
def test_opcheck(bias, dtype):
    tensors, plan = problem(tokens=7, bias=bias, dtype=dtype)
    inputs = leaves(**tensors)

    def call():
        y = ops.expert_linear(*(inputs[n] for n in NAMES), plan, backend="cpp")
        y.cumsum(0).sum().backward()

    opcheck_calls(call, {"expert_linear_cpp", "expert_linear_cpp_backward"})


def test_compiles_as_one_graph():
    torch.compiler.reset()

    def function(top_k_index, *inputs):
        return ops.expert_linear(*inputs, ops.plan(top_k_index, 3), backend="cpp")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (7, 12):
        tensors, _ = problem(tokens=tokens)
        ids = torch.randint(0, 4, (tokens, 2))
        arguments = [tensors[n] for n in NAMES]
        assert torch.equal(compiled(ids, *arguments), function(ids, *arguments))


@pytest.mark.parametrize(
    ("position", "value", "says"),
    [
        (0, torch.zeros(4, 32, 1), "x must be"),
        (0, torch.zeros(4, 32, dtype=torch.int64), "float32, bfloat16 or float16"),
        (1, torch.zeros(3, 48, 31), "weight must have shape"),
        (1, torch.zeros(3, 32, 48).mT, "weight must be contiguous"),
        (2, torch.zeros(3, 47), "bias must have shape"),
        (3, torch.zeros(5, 2), "top_k_weights must have shape"),
        (7, torch.full((8,), 9), "plan"),
    ],
)
def test_the_native_op_itself_refuses(position, value, says):
    tensors, plan = problem(tokens=4)
    arguments = [tensors[n] for n in NAMES]
    arguments += [plan.expert_offsets, plan.row_to_token, plan.row_to_slot, plan.slot_to_row]
    torch.ops.moe_fast_cpp.expert_linear(*arguments)
    arguments[position] = value
    with pytest.raises(RuntimeError, match=says):
        torch.ops.moe_fast_cpp.expert_linear(*arguments)
