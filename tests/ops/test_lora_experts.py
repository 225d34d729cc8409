"""lora_mlp and lora_linear: experts that share one MLP and differ by low-rank pairs."""

from __future__ import annotations

import pytest
import torch

from moe_fast import ops
from moe_fast.ops.plan import plan_of_slots

from . import oracle
from .helpers import (
    DTYPES,
    TOLERANCES,
    assert_close,
    assert_gradients_close,
    gradients,
    leaves,
)

F64 = torch.float64
T, D, H, E, R = 7, 5, 6, 3, 2
SCALE = 1.5


def linear_problem(*, k=2, dtype=F64, bias=True, out=H, width=D, prefix=""):
    return {
        f"{prefix}weight": torch.randn(out, width).to(dtype) / width**0.5,
        f"{prefix}bias": torch.randn(out).to(dtype) if bias else None,
        f"{prefix}a": torch.randn(E, R, width).to(dtype) / width**0.5,
        f"{prefix}b": torch.randn(E, out, R).to(dtype),
    }


def problem(*, k=2, dtype=F64, bias=True, gated=False):
    torch.manual_seed(3)
    inputs = leaves(
        x=torch.randn(T, D).to(dtype),
        **linear_problem(dtype=dtype, bias=bias, out=H * (1 + gated), prefix="up_"),
        **linear_problem(dtype=dtype, bias=bias, out=D, width=H, prefix="down_"),
        top_k_weights=torch.rand(T, k).to(F64 if dtype == F64 else None),
    )
    index = torch.randint(0, E, (T, k))
    index[2] = E  # padding
    return inputs, index


def pair(inputs, prefix):
    return ops.LowRank(inputs[f"{prefix}a"], inputs[f"{prefix}b"], SCALE)


def ours(inputs, index, **settings):
    return ops.lora_mlp(
        inputs["x"],
        inputs["up_weight"],
        inputs["down_weight"],
        inputs["up_bias"],
        inputs["down_bias"],
        pair(inputs, "up_"),
        pair(inputs, "down_"),
        inputs["top_k_weights"],
        ops.plan(index, E),
        **settings,
    )


def full(inputs, prefix):
    """Weights and biases [E, ...] of experts of their own."""
    parts = (inputs[prefix + name] for name in ("weight", "a", "b"))
    bias = inputs[f"{prefix}bias"]
    stacked = None if bias is None else bias.double().expand(E, -1)
    return oracle.lora_weights(*parts, SCALE), stacked


def theirs(inputs, index, **settings):
    (up, up_bias), (down, down_bias) = full(inputs, "up_"), full(inputs, "down_")
    weights = inputs["top_k_weights"]
    return oracle.expert_mlp(inputs["x"], up, down, up_bias, down_bias, weights, index, **settings)


def assert_same(actual, expected, inputs, tolerance):
    assert actual.dtype == inputs["x"].dtype
    assert_close(actual, expected, tolerance, "y")
    upstream = torch.randn(expected.shape).to(actual.dtype)
    grads = gradients([actual], [upstream], inputs)
    assert all(grads[name].dtype == inputs[name].dtype for name in grads)
    assert_gradients_close(grads, gradients([expected], [upstream], inputs), tolerance)


@pytest.mark.parametrize("act", ["gelu", "silu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [1, 2])
def test_mlp_and_its_gradients(k, bias, gated, act):
    inputs, index = problem(k=k, bias=bias, gated=gated)
    settings = {"gated": gated, "act": act}
    actual, expected = ours(inputs, index, **settings), theirs(inputs, index, **settings)
    assert not actual[2].any()
    assert_same(actual, expected, inputs, TOLERANCES[F64])


@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_in_lower_precision(dtype):
    inputs, index = problem(dtype=dtype)
    # W, its pair and the sum of slots are rounded apart: some roundings more than one product.
    assert_same(ours(inputs, index), theirs(inputs, index), inputs, 3 * TOLERANCES[dtype])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_linear_and_its_gradients(k, bias):
    torch.manual_seed(4)
    inputs = leaves(
        x=torch.randn(T, D, dtype=F64),
        **linear_problem(bias=bias),
        top_k_weights=torch.rand(T, k, dtype=F64),
    )
    index = torch.randint(0, E + 2, (T, k))  # ids from E on are skipped, also some of a token's
    x, weight, bias_value = (inputs[name] for name in ("x", "weight", "bias"))
    actual = ops.lora_linear(
        x, weight, bias_value, pair(inputs, ""), inputs["top_k_weights"], ops.plan(index, E)
    )
    stacked, biases = full(inputs, "")
    expected = oracle.expert_linear(x, stacked, biases, inputs["top_k_weights"], index)
    assert_same(actual, expected, inputs, TOLERANCES[F64])


def test_skipped_tokens_give_zero_whatever_they_hold():
    inputs, index = problem()
    clean = ours(inputs, index).detach()
    with torch.no_grad():
        inputs["x"][2] = float("nan")
        inputs["top_k_weights"][2] = float("inf")
    y = ours(inputs, index)
    assert torch.equal(y, clean)
    y.sum().backward()
    for name, value in inputs.items():
        assert value.grad.isfinite().all(), name
    assert not inputs["x"].grad[2].any()


def test_frozen_weights_get_no_gradient():
    inputs, index = problem()
    frozen = [name for name in inputs if name.endswith(("weight", "bias"))]
    for name in frozen:
        inputs[name].requires_grad_(False)
    ours(inputs, index).sum().backward()
    assert all(inputs[name].grad is None for name in frozen)
    assert all(inputs[name].grad.any() for name in inputs.keys() - set(frozen))


def test_no_tokens():
    inputs, index = problem()
    for name in ("x", "top_k_weights"):
        inputs[name] = inputs[name][:0]
    assert ours(inputs, index[:0]).shape == (0, D)


def test_autocast():
    inputs, index = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(inputs, index)
    assert y.dtype == torch.bfloat16
    assert_close(y, theirs(inputs, index), 3 * TOLERANCES[torch.bfloat16])


def test_a_plan_of_slots_has_one_token_per_slot():
    plan = ops.plan(torch.tensor([[0, 2], [2, 0], [3, 1]]), 3)
    slots = plan_of_slots(plan, 2)
    assert slots.row_to_token.tolist() == plan.row_to_slot.tolist()
    want = ops.plan(torch.tensor([[0], [2], [2], [0], [3], [1]]), 3)
    assert all(torch.equal(a, b) for a, b in zip(slots.indices, want.indices, strict=True))
    assert slots.layout == want.layout
    assert plan_of_slots(want, 1) is want


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("up_a", torch.zeros(E, R, D + 1, dtype=F64), r"up_pair\.a must have shape"),
        ("down_b", torch.zeros(E, D, R + 1, dtype=F64), r"down_pair\.b must have shape"),
        ("up_weight", torch.zeros(E, H, D, dtype=F64), "up_pair's weight must have shape"),
    ],
)
def test_bad_input(name, value, said):
    inputs, index = problem()
    with pytest.raises(ValueError, match=said):
        ours({**inputs, name: value}, index)
    with pytest.raises(ValueError, match="act must be one of"):
        ours(inputs, index, act="tanh")
