"""bf16 experts whose sizes AMX tiles take, wherever this processor has them.

Tiles serve widths that are multiples of 32; others run by oneDNN's kernel or by dot products, also
in one task. MOE_FAST_CPU and MOE_FAST_PRODUCT force the others: see test_other_processors.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import ops
from moe_fast.ops import native

from .helpers import need_native_library, num_threads, property_test, relative_error
from .test_expert_mlp_cpp import NAMES, assert_right, problem

need_native_library()

if not native.cpu_capability.endswith("AMX tiles, amx"):
    pytest.skip("this processor has no AMX, or it is not in use", allow_module_level=True)

BF16 = torch.bfloat16
# Relative to the largest entry: roundings of x, z, h (2^-9 each) and of the result, as in the tests
# of the other products.
BOUND = 2e-2


@property_test
@given(
    rows=st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 48, 49, 64, 97, 112, 400]),
    experts=st.sampled_from([1, 2, 3]),
    dim=st.sampled_from([32, 64, 96, 160, 544, 1056]),
    hidden=st.sampled_from([32, 96, 128, 160, 544]),
    gated=st.booleans(),
    bias=st.booleans(),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 999),
)
def test_any_number_of_rows_and_tiles(rows, experts, dim, hidden, gated, bias, threads, seed):
    torch.manual_seed(seed)
    k = 1 + seed % min(2, experts)
    inputs, plan = problem(
        rows * experts, k, experts, dim, hidden, gated=gated, bias=bias, dtype=BF16
    )
    with num_threads(threads):
        assert_right(inputs, plan, gated=gated, recompute="up" if seed % 2 else None)


@pytest.mark.parametrize(("dim", "hidden"), [(64, 80), (48, 64), (40, 96), (64, 66)])
def test_sizes_of_which_one_fits(dim, hidden):
    """Some products of a call are by tiles, others by oneDNN's kernel, which uses tiles itself."""
    inputs, plan = problem(300, 2, 3, dim, hidden, dtype=BF16)
    assert_right(inputs, plan)


@pytest.mark.parametrize("rows", [1, 700])
def test_one_expert_has_half_of_the_rows(rows):
    inputs, _ = problem(2 * rows, 1, 4, 64, 256, dtype=BF16)
    ids = torch.where(torch.arange(2 * rows) < rows, 0, torch.randint(1, 4, (2 * rows,)))
    assert_right(inputs, ops.plan(ids[:, None], 4))


def test_torchs_own_products_before_and_after():
    """Both configure tiles; neither may find those of the other."""
    inputs, plan = problem(200, 1, 3, 96, 160, dtype=BF16, skip=False)
    a, b = torch.randn(200, 96).to(BF16), torch.randn(64, 96).to(BF16)
    exact = a.double() @ b.double().T
    with num_threads(1):
        ours = ops.expert_mlp(*(inputs[n] for n in NAMES), plan)
        for _ in range(3):
            assert relative_error(F.linear(a, b), exact) < BOUND
            assert torch.equal(ops.expert_mlp(*(inputs[n] for n in NAMES), plan), ours)
            odd, odd_plan = problem(60, 1, 2, 44, 36, dtype=BF16)
            assert_right(odd, odd_plan)  # by oneDNN's block kernel
    assert_right(inputs, plan)


def test_infinite_and_nan_rows_stay_in_their_rows():
    inputs, plan = problem(90, 1, 2, 64, 64, dtype=BF16, skip=False)
    clean = ops.expert_mlp(*(inputs[n] for n in NAMES), plan)
    inputs["x"] = inputs["x"].clone()
    inputs["x"][7, 3], inputs["x"][40, 5] = float("nan"), float("inf")
    y = ops.expert_mlp(*(inputs[n] for n in NAMES), plan)
    others = torch.ones(90, dtype=torch.bool)
    others[[7, 40]] = False
    assert torch.equal(y[others], clean[others])
    assert y[7].isnan().all() and not y[40].isfinite().any()
