"""expert_mlp_norm: LayerNorm(dropout(expert_mlp(x)) + residual), values and gradients."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

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
from .test_expert_mlp import ORDER, D, E, problem

F64, EPS = torch.float64, 1e-5
BLOCK = ["residual", "norm_weight", "norm_bias"]


def with_block(dtype: torch.dtype = F64, **settings) -> tuple[dict, Tensor]:
    """An expert MLP's tensors, those of the block behind it, and the ids."""
    inputs, top_k_index = problem(dtype=dtype, **settings)
    inputs |= leaves(
        residual=torch.randn(inputs["x"].shape).to(dtype),
        norm_weight=torch.randn(D).to(dtype),
        norm_bias=torch.randn(D).to(dtype),
    )
    return inputs, top_k_index


def ours(inputs: dict, top_k_index: Tensor, **kwargs) -> Tensor:
    tensors = [inputs[name] for name in ORDER]
    plan = ops.plan(top_k_index, inputs["up_proj"].shape[0])
    return ops.expert_mlp_norm(*tensors, plan, *(inputs[n] for n in BLOCK), eps=EPS, **kwargs)


def theirs(inputs: dict, top_k_index: Tensor, dropped: Tensor | None = None, **kwargs) -> Tensor:
    """Token by token; ``dropped`` [T, D]: what dropout makes of ones."""
    y = oracle.expert_mlp(*(inputs[name] for name in ORDER), top_k_index, **kwargs)
    out = []
    for t in range(len(y)):
        s = y[t] if dropped is None else y[t] * dropped[t].double()
        s = s + inputs["residual"][t].double()
        centred = s - s.sum() / D
        normal = centred / (centred.pow(2).sum() / D + EPS).sqrt()
        out.append(inputs["norm_weight"].double() * normal + inputs["norm_bias"].double())
    return torch.stack(out)


def assert_same(inputs, top_k_index, tolerance, dropout=0.0, recompute=None, **kwargs) -> None:
    """Forward and every gradient."""
    torch.manual_seed(1)
    actual = ours(inputs, top_k_index, dropout=dropout, recompute=recompute, **kwargs)
    torch.manual_seed(1)
    dropped = F.dropout(torch.ones(actual.shape, dtype=F64), dropout)
    expected = theirs(inputs, top_k_index, dropped, **kwargs)
    assert actual.dtype == inputs["x"].dtype
    assert_close(actual, expected, tolerance, "out")
    upstream = [torch.randn(expected.shape).to(actual.dtype)]
    grads = gradients([actual], upstream, inputs)
    assert all(grads[name].dtype == inputs[name].dtype for name in grads)
    assert_gradients_close(grads, gradients([expected], upstream, inputs), tolerance)


@pytest.mark.parametrize("recompute", [None, "up"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_values_and_gradients_equal_the_oracle(gated, k, dropout, recompute):
    """The dropped entries are those that PyTorch's dropout drops from the same seed."""
    inputs, top_k_index = with_block(gated=gated, k=k, biases="none" if gated else "both")
    assert_same(inputs, top_k_index, 1e-10, dropout, recompute, gated=gated)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lower_precision(dtype, k):
    # LayerNorm divides by a deviation of about 1; bfloat16 rounds s once more than expert_mlp.
    inputs, top_k_index = with_block(dtype, k=k)
    assert_same(inputs, top_k_index, 2 * TOLERANCES[dtype], dropout=0.25)


@property_test
@given(
    num_experts=st.sampled_from([1, 2, 5, 8]),
    k=st.sampled_from([1, 2, 99]),
    num_tokens=st.sampled_from([1, 2, 9]),
    dropout=st.sampled_from([0.0, 0.5, 1.0]),
    skip=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_shape(num_experts, k, num_tokens, dropout, skip, seed):
    torch.manual_seed(seed)
    sizes = dict(num_experts=num_experts, k=min(k, num_experts), num_tokens=num_tokens, skip=skip)
    # A sum over 5 columns can nearly vanish, and its inverse deviation amplifies rounding.
    assert_same(*with_block(**sizes), 1e-8, dropout)


def test_no_tokens():
    inputs, top_k_index = with_block(num_tokens=0)
    out = ours(inputs, top_k_index, dropout=0.5)
    assert out.shape == (0, D)
    for name, grad in gradients([out], [out], inputs).items():
        assert torch.equal(grad, torch.zeros_like(inputs[name])), name


def test_a_skipped_token_gets_the_norm_of_its_residual():
    inputs, _ = with_block()
    inputs["x"].data[2] = float("nan")
    ids = torch.zeros(7, 2, dtype=torch.long)
    ids[2] = E
    out = ours(inputs, ids)
    norm = inputs["norm_weight"], inputs["norm_bias"]
    assert_close(out[2], F.layer_norm(inputs["residual"][2], (D,), *norm, EPS))
    assert torch.isfinite(out).all()


def test_a_gradient_that_is_expanded():
    inputs, top_k_index = with_block()
    total, expected = ours(inputs, top_k_index).sum(), theirs(inputs, top_k_index).sum()
    one = [torch.ones((), dtype=F64)]
    # Sums of a normalised row are constants but for beta: their gradients cancel.
    wanted = {n: inputs[n] for n in ("norm_weight", "norm_bias", "residual", "down_proj")}
    assert_gradients_close(gradients([total], one, wanted), gradients([expected], one, wanted))


def test_autocast_normalises_in_float32():
    inputs, top_k_index = with_block(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(inputs, top_k_index)
        tensors = [inputs[name] for name in ORDER]
        y = ops.expert_mlp(*tensors, ops.plan(top_k_index, E))
        norm = inputs["norm_weight"], inputs["norm_bias"]
        expected = F.layer_norm(y + inputs["residual"], (D,), *norm, EPS)
    assert out.dtype == expected.dtype == torch.float32
    assert_close(out, expected, TOLERANCES[torch.bfloat16])  # y is rounded there, here it need not
    upstream = [torch.randn(out.shape)]
    grads = [gradients([o], upstream, inputs) for o in (out, expected)]
    assert_gradients_close(*grads, TOLERANCES[torch.bfloat16])


def test_two_runs_agree_to_the_last_bit():
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        inputs, top_k_index = with_block(torch.float32, num_tokens=67)
        out = ours(inputs, top_k_index, dropout=0.3)
        runs.append([out, *gradients([out], [torch.randn(out.shape)], inputs).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_opcheck(dropout):
    inputs, top_k_index = with_block(torch.float32)
    plan = ops.plan(top_k_index, E)
    tensors = [inputs[n] for n in ORDER] + [plan] + [inputs[n] for n in BLOCK]
    # PyTorch's is a composition; Triton's is an op of its own.
    triton = os.environ.get("MOE_FAST_BACKEND") == "triton"
    name, backend = ("expert_mlp_norm", "triton") if triton else ("expert_mlp", "torch")
    opcheck_calls(
        lambda: (
            ops.expert_mlp_norm(*tensors, dropout=dropout, backend=backend)
            .cumsum(0)
            .sum()
            .backward()
        ),
        {name, f"{name}_backward"},
    )


def test_compiles_as_one_graph():
    torch.compiler.reset()

    def function(inputs: dict, ids: Tensor) -> Tensor:
        return ours(inputs, ids)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (7, 12):
        inputs, ids = with_block(torch.float32, num_tokens=tokens)
        ids = ids.clamp(max=E)
        upstream = [torch.randn(tokens, D)]
        outs = compiled(inputs, ids), function(inputs, ids)
        assert torch.equal(*outs)
        grads = [gradients([o], upstream, inputs, retain_graph=False) for o in outs]
        assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (dict(residual=torch.zeros(7, 4)), ValueError, ["residual", "[T, D]", "[7, 4]"]),
        (dict(residual=torch.zeros(7, D)), TypeError, ["residual", "float64", "float32"]),
        (dict(residual=torch.zeros(7, D).int()), TypeError, ["residual", "int32"]),
        (dict(norm_weight=torch.zeros(4)), ValueError, ["norm_weight", "[D]", "[4]"]),
        (dict(norm_bias=torch.zeros(D, 1)), ValueError, ["norm_bias", "[D]", "[5, 1]"]),
        (dict(dropout=1.5), ValueError, ["dropout", "0 to 1", 1.5]),
        (dict(act="tanh"), ValueError, ["act", "gelu", "tanh"]),
    ],
)
def test_bad_input(change, error, says):
    inputs, top_k_index = with_block()
    tensors = {n: change.pop(n) for n in list(change) if n in inputs}
    with pytest.raises(error) as caught:
        ours(inputs | tensors, top_k_index, **change)
    assert_says(caught, *says)
