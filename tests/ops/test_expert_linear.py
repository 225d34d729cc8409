"""expert_linear: one linear map per expert, summed with the routing weights."""

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
    opcheck_calls,
    property_test,
)

F64 = torch.float64
T, K, E, I, O = 7, 2, 3, 5, 6  # noqa: E741
ORDER = ["x", "weight", "bias", "top_k_weights"]


def problem(
    *, num_tokens=T, k=K, num_experts=E, bias=True, dtype=F64, skip=True
) -> tuple[dict, torch.Tensor]:
    """Values of unit scale, and ids of which some are >= E unless ``skip`` is false."""
    inputs = leaves(
        x=torch.randn(num_tokens, I).to(dtype),
        weight=(torch.randn(num_experts, O, I) / I**0.5).to(dtype),
        bias=torch.randn(num_experts, O).to(dtype) if bias else None,
        top_k_weights=torch.rand(num_tokens, k).to(F64 if dtype == F64 else None),
    )
    return inputs, torch.randint(0, num_experts + (2 if skip else 0), (num_tokens, k))


def ours(inputs: dict, top_k_index: torch.Tensor) -> torch.Tensor:
    plan = ops.plan(top_k_index, inputs["weight"].shape[0])
    return ops.expert_linear(*(inputs[name] for name in ORDER), plan)


def theirs(inputs: dict, top_k_index: torch.Tensor) -> torch.Tensor:
    return oracle.expert_linear(*(inputs[name] for name in ORDER), top_k_index)


def assert_same(inputs, top_k_index, tolerance=TOLERANCES[F64]) -> None:
    """Forward and every gradient."""
    actual, expected = ours(inputs, top_k_index), theirs(inputs, top_k_index)
    assert actual.dtype == inputs["x"].dtype
    assert_close(actual, expected, tolerance, "y")
    upstream = torch.randn(expected.shape).to(actual.dtype)
    grads = gradients([actual], [upstream], inputs)
    assert all(grads[name].dtype == inputs[name].dtype for name in grads)
    assert_gradients_close(grads, gradients([expected], [upstream], inputs), tolerance)


# --------------------------------------------------------------------- agreement with the oracle


@property_test
@given(
    num_experts=st.sampled_from([1, 2, 3, 5, 7, 8, 16]),
    k=st.sampled_from([1, 2, 99]),
    num_tokens=st.sampled_from([0, 1, 2, 9]),
    bias=st.booleans(),
    skip=st.booleans(),
    seed=st.integers(0, 999),
)
def test_values_and_gradients_equal_the_oracle(num_experts, k, num_tokens, bias, skip, seed):
    torch.manual_seed(seed)
    inputs, top_k_index = problem(
        num_experts=num_experts,
        k=min(k, num_experts),
        num_tokens=num_tokens,
        bias=bias,
        skip=skip,
    )
    if num_tokens:
        assert_same(inputs, top_k_index)
        return
    y = ours(inputs, top_k_index)
    assert y.shape == (0, O)
    for name, grad in gradients([y], [y], inputs).items():
        assert torch.equal(grad, torch.zeros_like(inputs[name]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lower_precision(dtype, bias):
    assert_same(*problem(bias=bias, dtype=dtype), TOLERANCES[dtype])


def test_copies_of_one_linear_equal_it():
    linear = torch.nn.Linear(I, O, dtype=F64)
    x, router = torch.randn(40, I, dtype=F64), torch.randn(E, I, dtype=F64)
    for k in (1, 2, E):
        routing = ops.route(x, router, k)  # weights sum to one
        plan = ops.plan(routing.top_k_index, E)
        y = ops.expert_linear(
            x, linear.weight.expand(E, O, I), linear.bias.expand(E, O), routing.top_k_weights, plan
        )
        assert_close(y, linear(x), 1e-12)


def test_two_of_them_and_an_activation_are_expert_mlp_at_k_1():
    inputs, top_k_index = problem(k=1)
    down, down_bias = torch.randn(E, I, O, dtype=F64), torch.randn(E, I, dtype=F64)
    plan = ops.plan(top_k_index, E)
    one = torch.ones(T, 1, dtype=F64)
    h = torch.nn.functional.gelu(
        ops.expert_linear(inputs["x"], inputs["weight"], inputs["bias"], one, plan)
    )
    w = inputs["top_k_weights"]
    y = ops.expert_mlp(inputs["x"], inputs["weight"], down, inputs["bias"], down_bias, w, plan)
    assert_close(ops.expert_linear(h, down, down_bias, w, plan), y)


# ------------------------------------------------------------------------------ skipped and empty


@pytest.mark.parametrize("skipped_id", [E, E + 1, 1 << 40])
def test_skipped_tokens_give_exactly_zero_and_leak_nothing(skipped_id):
    """Rows that are skipped may hold NaN, in x, in the weights and in the upstream gradient."""
    inputs, top_k_index = problem(skip=False)
    skipped = torch.tensor([1, 4])
    top_k_index[skipped] = skipped_id
    top_k_index[3, 0] = skipped_id
    results = []
    for value in (0.0, float("nan"), float("inf")):
        dirty = leaves(
            **inputs
            | dict(
                x=inputs["x"].index_fill(0, skipped, value),
                top_k_weights=inputs["top_k_weights"].masked_fill(top_k_index >= E, value),
            )
        )
        y = ours(dirty, top_k_index)
        upstream = torch.ones(T, O, dtype=F64).cumsum(1).index_fill(0, skipped, value)
        grads = gradients([y], [upstream], dirty)
        assert (y[skipped] == 0).all()
        assert (grads["x"][skipped] == 0).all()
        assert (grads["top_k_weights"][top_k_index >= E] == 0).all()
        results.append([y, *grads.values()])
    for clean, nan, inf in zip(*results, strict=True):
        assert torch.equal(clean, nan)
        assert torch.equal(clean, inf)


@pytest.mark.parametrize("expert", range(E))
def test_all_tokens_to_one_expert_and_no_gradient_for_the_others(expert):
    inputs, _ = problem(k=1)
    top_k_index = torch.full((T, 1), expert)
    assert_same(inputs, top_k_index)
    y = ours(inputs, top_k_index)
    grads = gradients([y], [torch.ones_like(y)], inputs)
    others = [e for e in range(E) if e != expert]
    assert (grads["weight"][others] == 0).all()
    assert (grads["bias"][others] == 0).all()


# ------------------------------------------------------------------------------------ odd inputs


def test_rows_do_not_depend_on_their_order():
    inputs, top_k_index = problem(num_tokens=30)
    order = torch.randperm(30)
    shuffled = inputs | dict(x=inputs["x"][order], top_k_weights=inputs["top_k_weights"][order])
    assert_close(ours(shuffled, top_k_index[order]), ours(inputs, top_k_index)[order], 1e-14)


def test_non_contiguous_inputs():
    inputs, top_k_index = problem()
    twisted = {
        # the same values, last dimension stored first
        n: t.detach().movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_()
        for n, t in inputs.items()
    }
    assert not any(t.is_contiguous() for t in twisted.values())
    assert_same(twisted, top_k_index)
    expanded = inputs | {"x": torch.randn(1, I, dtype=F64).expand(T, I).requires_grad_()}
    assert_same(expanded, top_k_index)


def test_expanded_upstream_gradients():
    """``y.sum().backward()`` sends one number with stride 0; a row or a column likewise."""
    inputs, top_k_index = problem()
    y, expected = ours(inputs, top_k_index), theirs(inputs, top_k_index)
    for upstream in [
        torch.ones((), dtype=F64).expand(T, O),
        torch.randn(O, dtype=F64).expand(T, O),
        torch.randn(T, 1, dtype=F64).expand(T, O),
        torch.randn(O, T, dtype=F64).T,
    ]:
        assert_gradients_close(
            gradients([y], [upstream], inputs), gradients([expected], [upstream], inputs)
        )


def test_only_the_gradients_that_are_wanted():
    inputs, top_k_index = problem()
    expected = gradients([theirs(inputs, top_k_index).sum()], [torch.ones(())], inputs)
    for name in ORDER:
        frozen = {n: t.detach().requires_grad_(n == name) for n, t in inputs.items()}
        ours(frozen, top_k_index).sum().backward()
        assert_close(frozen[name].grad, expected[name])
        assert all(t.grad is None for n, t in frozen.items() if n != name)


def test_two_runs_are_bitwise_equal():
    inputs, top_k_index = problem(dtype=torch.float32, num_tokens=50)

    def once():
        y = ours(inputs, top_k_index)
        return [y, *gradients([y], [torch.ones_like(y).cumsum(0)], inputs).values()]

    assert all(torch.equal(p, q) for p, q in zip(once(), once(), strict=True))


# ------------------------------------------------------------------- autocast, autograd, compiler


def test_autocast():
    """float32 parameters, bf16 products: a bf16 output near the truth, float32 gradients."""
    inputs, top_k_index = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(inputs, top_k_index)
        mixed = ours(inputs | {"x": inputs["x"].bfloat16()}, top_k_index)
    assert y.dtype == mixed.dtype == torch.bfloat16
    expected = theirs(inputs, top_k_index)
    # Here the rounding of the inputs counts too.
    assert_close(y, expected, 3e-2)
    assert_close(mixed, expected, 3e-2)
    upstream = torch.randn(T, O)
    grads = gradients([y], [upstream], inputs)
    assert all(g.dtype == torch.float32 for g in grads.values())
    assert_gradients_close(grads, gradients([expected], [upstream], inputs), 5e-2)


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias):
    inputs, top_k_index = problem(num_tokens=4, bias=bias)
    plan = ops.plan(top_k_index, E)
    tensors = tuple(inputs[n] for n in ORDER)
    assert torch.autograd.gradcheck(lambda *t: ops.expert_linear(*t, plan), tensors)


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias):
    inputs, top_k_index = problem(bias=bias)
    plan = ops.plan(top_k_index, E)

    def call():
        tensors = (inputs[n] for n in ORDER)
        ops.expert_linear(*tensors, plan).cumsum(0).sum().backward()

    opcheck_calls(call, {"expert_linear", "expert_linear_backward"})


def test_compiles_as_one_graph():
    torch.compiler.reset()

    def function(x, weight, bias, top_k_weights, top_k_index):
        return ops.expert_linear(x, weight, bias, top_k_weights, ops.plan(top_k_index, E))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (T, 12):
        inputs, top_k_index = problem(num_tokens=num_tokens)
        args = [inputs[n] for n in ORDER]
        expected, actual = function(*args, top_k_index), compiled(*args, top_k_index)
        upstream = torch.randn_like(expected)
        assert_close(actual, expected, 1e-14)
        assert_gradients_close(
            gradients([actual], [upstream], inputs, retain_graph=False),
            gradients([expected], [upstream], inputs),
            1e-14,
        )


# ------------------------------------------------------------------------------------- bad input


def meta(shape: list[int]) -> torch.Tensor:
    return torch.zeros(shape, device="meta")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(x=torch.randn(2, T, I)), ["x", "[2, 7, 5]", "[T, I]"]),
        (dict(x=torch.randn(T, 4)), ["weight", "[3, 6, 5]", "4"]),
        (dict(x=torch.randn(T, I, dtype=F64)), ["weight", "float32", "float64"]),
        (dict(x=torch.ones(T, I, dtype=torch.int64)), ["x", "int64", "float"]),
        (dict(weight=torch.randn(E, I)), ["weight", "[3, 5]", "[E, O, I]"]),
        (dict(weight=torch.randn(E, O, I).bfloat16()), ["weight", "bfloat16", "float32"]),
        (dict(weight=meta([E, O, I])), ["weight", "meta", "cpu"]),
        (dict(bias=torch.randn(E, I)), ["bias", "[3, 5]", "[3, 6]"]),
        (dict(bias=torch.randn(E, O).half()), ["bias", "float16", "float32"]),
        (dict(bias=meta([E, O])), ["bias", "meta", "cpu"]),
        (dict(top_k_weights=torch.rand(T, 1)), ["plan", "[7]", "[14]", "T * K"]),
        (dict(top_k_weights=torch.ones(T, K).long()), ["top_k_weights", "int64", "float32"]),
        (dict(top_k_weights=meta([T, K])), ["top_k_weights", "meta", "cpu"]),
        (dict(plan=ops.plan(torch.zeros(4, K, dtype=torch.int64), E)), ["plan", "8", "14"]),
        (
            dict(plan=ops.plan(torch.zeros(T, K, dtype=torch.int64), 4)),
            ["plan", "[4]", "[5]", "E + 1"],
        ),
        (dict(backend="cuda"), ["backend", "cuda", "auto", "torch"]),
    ],
)
def test_bad_input(change, says):
    inputs, top_k_index = problem(dtype=torch.float32, skip=False)
    arguments = inputs | dict(plan=ops.plan(top_k_index, E)) | change
    with pytest.raises((ValueError, TypeError)) as error:
        ops.expert_linear(**arguments)
    assert_says(error, *says)
