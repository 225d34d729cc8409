"""The pass after a grouped product: bias, routing weight, and the store in token order.

out[r or its token] = weight[r] * (rows[r] + bias[e])        for the rows r of expert e
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import COLUMNS, ROWS, Plan, accumulator, expert_block, triton_dtype
from .numerics import cast
from .zero_tail import zero_tail


@triton.jit
def row_epilogue_kernel(
    rows_ptr,  # [S, N]
    bias_ptr,  # [E, N]
    row_weight_ptr,  # [S] by slot
    out_ptr,  # [S, N], by token [T, N]
    offsets_ptr,  # [E + 1]
    row_to_token_ptr,  # [S]
    row_to_slot_ptr,  # [S]
    E,
    N,
    E_BLOCK: tl.constexpr,
    SCATTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS rows by COLUMNS columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = row < tl.load(offsets_ptr + E)
    mask = valid[:, None] & (n < N)[None, :]
    value = tl.load(rows_ptr + row[:, None] * N + n[None, :], mask=mask, other=0).to(ACC)
    if HAS_BIAS:
        experts = tl.arange(0, E_BLOCK)
        ends = tl.load(offsets_ptr + experts + 1, mask=experts < E, other=0)
        before = (ends[None, :] <= row[:, None]) & (experts < E)[None, :]
        expert = tl.sum(before.to(tl.int64), 1)
        value += tl.load(bias_ptr + expert[:, None] * N + n[None, :], mask=mask, other=0).to(ACC)
    if WEIGHTED:
        slot = tl.load(row_to_slot_ptr + row, mask=valid, other=0)
        value *= tl.load(row_weight_ptr + slot, mask=valid & (slot >= 0), other=0).to(ACC)[:, None]
    if SCATTER:
        row = tl.load(row_to_token_ptr + row, mask=valid, other=0)
        mask = mask & (row >= 0)[:, None]
    out = out_ptr + row[:, None] * N + n[None, :]
    tl.store(out, cast(value, out_ptr.dtype.element_ty), mask=mask)


def row_epilogue(
    rows: Tensor,
    bias: Tensor | None,
    row_weights: Tensor | None,
    plan: Plan,
    by_token: Tensor | None = None,
) -> Tensor:
    """[S, N]; rows from ``expert_offsets[E]`` on are neither read nor written.

    Args:
        rows: [S, N], contiguous.
        bias, row_weights: as in :func:`.linear.linear`.
        by_token: [T, N], written by token instead and returned; 0 for tokens of skipped rows.
    """
    num_rows, n = rows.shape
    out = rows.new_empty(num_rows, n) if by_token is None else by_token
    if not out.numel():
        return out
    expert_offsets, row_to_token, _ = plan
    num_experts = expert_offsets.shape[0] - 1
    row_epilogue_kernel[(triton.cdiv(num_rows, ROWS), triton.cdiv(n, COLUMNS))](
        rows,
        None if bias is None else bias.contiguous(),
        row_weights,
        out,
        *plan,
        num_experts,
        n,
        E_BLOCK=expert_block(num_experts),
        SCATTER=by_token is not None,
        HAS_BIAS=bias is not None,
        WEIGHTED=row_weights is not None,
        ACC=triton_dtype(accumulator(rows.dtype)),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    if by_token is None:
        return out
    return zero_tail(out, expert_offsets, row_to_token, by_token=True)
