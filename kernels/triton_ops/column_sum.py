"""Gradient of a bias: the weighted sum of each expert's rows, ``db[e] = sum of w * a[r]``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Plan, accumulator, row_major, triton_dtype
from .split_sum import split_sum

_ROWS, _COLUMNS = 64, 64
# The most runs that an expert's rows are divided into; their sums are added in a fixed order.
_MOST_SPLITS = 32


@triton.jit(do_not_specialize=["splits"])
def column_sum_kernel(
    a_ptr,  # [T, N]
    row_weight_ptr,  # [S] by slot
    out_ptr,  # [splits, E, N]
    offsets_ptr,
    row_to_token_ptr,
    row_to_slot_ptr,
    E,
    N,
    splits,
    stride_a,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """COLUMNS sums over one run of one expert's rows."""
    expert, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(offsets_ptr + expert)
    last = tl.load(offsets_ptr + expert + 1)
    run = tl.cdiv(last - first, splits)
    first += split * run
    last = tl.minimum(last, first + run)
    total = tl.zeros((COLUMNS,), ACC)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        valid = row < last
        token = tl.load(row_to_token_ptr + row, mask=valid, other=0)
        slot = tl.load(row_to_slot_ptr + row, mask=valid, other=0)
        weight = tl.load(row_weight_ptr + slot, mask=valid, other=0).to(ACC)
        a = a_ptr + token[:, None] * stride_a + n[None, :]
        tile = tl.load(a, mask=valid[:, None] & (n < N)[None, :], other=0).to(ACC)
        total += tl.sum(tile * weight[:, None], 0)
    tl.store(out_ptr + (split * E + expert).to(tl.int64) * N + n, total, mask=n < N)


def column_sum(a: Tensor, row_weights: Tensor, plan: Plan) -> Tensor:
    """[E, N] in a's dtype; zeros for experts without rows.

    Args:
        a: [T, N], gathered by token.
        row_weights: [S] by slot, float32 or float64.
    """
    expert_offsets, row_to_token, _ = plan
    num_experts, n = expert_offsets.shape[0] - 1, a.shape[1]
    out = a.new_empty(num_experts, n)
    if not out.numel():
        return out
    splits = min(_MOST_SPLITS, triton.cdiv(row_to_token.shape[0], num_experts * _ROWS)) or 1
    acc = accumulator(a.dtype)
    partial = a.new_empty(splits, num_experts, n, dtype=acc)
    a = row_major(a)
    column_sum_kernel[(num_experts * splits, triton.cdiv(n, _COLUMNS))](
        a,
        row_weights,
        partial,
        *plan,
        num_experts,
        n,
        splits,
        a.stride(0),
        ACC=triton_dtype(acc),
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )
    return split_sum(partial, out)
