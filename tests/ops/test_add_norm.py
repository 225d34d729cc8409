"""add_norm: against LayerNorm in float64, by each backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import ops
from moe_fast.ops import native

from .helpers import DTYPES, assert_close, num_threads, property_test

BACKENDS = ["torch", "cpp"] if native.why_not_on_cpu("cpu") is None else ["torch"]
# The result is computed in float32, whose sums over D terms of unit scale keep about 1e-6, and is
# rounded once to the dtype of the rows.
EXACT = 5e-6
ROUNDED = {torch.float32: EXACT, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def oracle(y, residual, weight, bias, eps):
    total = y.double() + residual.double()
    mean = total.mean(1, keepdim=True)
    variance = ((total - mean) ** 2).mean(1, keepdim=True)
    normed = (total - mean) / (variance + eps).sqrt() * weight.double()
    return normed if bias is None else normed + bias.double()


def problem(tokens, dim, dtype, residual_dtype, bias=True):
    draw = torch.randn
    shift = draw(dim).to(dtype) if bias else None
    return (
        draw(tokens, dim).to(dtype),
        draw(tokens, dim).to(residual_dtype),
        (1 + 0.3 * draw(dim)).to(dtype),
        shift,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@property_test
@given(
    tokens=st.sampled_from([0, 1, 2, 67]),
    dim=st.sampled_from([2, 3, 16, 33, 384, 1000]),
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
    bias=st.booleans(),
    eps=st.sampled_from([1e-12, 1e-5, 0.1]),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 999),
)
def test_equals_the_oracle(backend, tokens, dim, dtype, wide, bias, eps, threads, seed):
    torch.manual_seed(seed)
    given_ = problem(tokens, dim, dtype, torch.float32 if wide else dtype, bias)
    with torch.no_grad(), num_threads(threads):
        out, exact = ops.add_norm(*given_, eps=eps, backend=backend)
    want = oracle(*given_, eps)
    # Two elements can be nearly equal: then the norm enlarges the rounding of their difference.
    slack = 100 if dim < 4 else 1
    assert out.dtype == dtype and exact.dtype == torch.float32
    assert_close(exact, want, slack * EXACT)
    assert_close(out, want, slack * EXACT + ROUNDED[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend):
    y, residual, weight, bias = problem(3, 16, torch.bfloat16, torch.float32)
    y[1, 5] = torch.nan
    out, exact = ops.add_norm(y, residual, weight, bias, backend=backend)
    assert out[1].isnan().all() and exact[1].isnan().all()
    assert out[::2].isfinite().all()


def test_gradients_run_in_pytorch():
    y, residual, weight, bias = problem(3, 4, torch.float64, torch.float64)
    for tensor in (y, residual, weight, bias):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *t: ops.add_norm(*t, eps=1e-5).out, (y, residual, weight, bias)
    )


def test_bad_input():
    y, residual, weight, bias = problem(3, 8, torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match=r"residual must have shape \[T, D\] = \[3, 8\]"):
        ops.add_norm(y, residual[:2], weight, bias)
    with pytest.raises(TypeError, match="residual must have dtype bfloat16, float32"):
        ops.add_norm(y, residual.double(), weight, bias)
    with pytest.raises(ValueError, match="norm bias must have shape"):
        ops.add_norm(y, residual, weight, bias[:4])
