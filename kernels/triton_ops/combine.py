"""Rows back to tokens: ``y[t] = sum over k of w[t, k] * rows[slot_to_row[t, k]]``.

Slots are added in their order, without atomics; skipped slots (-1) contribute 0 and are not read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import COLUMNS, ROWS, accumulator, triton_dtype
from .numerics import cast


@triton.jit(do_not_specialize=["T"])
def combine_kernel(
    rows_ptr,  # [S, N]
    weight_ptr,  # [T, K]
    slot_to_row_ptr,  # [S]
    out_ptr,  # [T, N]
    T,
    K,
    N,
    WEIGHTED: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS tokens by COLUMNS columns."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), ACC)
    for k in range(0, K):
        row = tl.load(slot_to_row_ptr + token * K + k, mask=token < T, other=-1)
        mask = (row >= 0)[:, None] & (n < N)[None, :]
        value = tl.load(rows_ptr + row[:, None] * N + n[None, :], mask=mask, other=0).to(ACC)
        if WEIGHTED:
            weight = tl.load(weight_ptr + token * K + k, mask=row >= 0, other=0).to(ACC)
            value *= weight[:, None]
        total += value
    out = out_ptr + token[:, None] * N + n[None, :]
    mask = (token < T)[:, None] & (n < N)[None, :]
    tl.store(out, cast(total, out_ptr.dtype.element_ty), mask=mask)


def combine(rows: Tensor, slot_to_row: Tensor, weights: Tensor | None, k: int) -> Tensor:
    """The sum over each token's slots.

    Args:
        rows: [S, N] contiguous.
        slot_to_row: [S] int64, -1 = skipped.
        weights: [T, K] contiguous, float32 or float64, or ``None`` for 1.
        k: K = S / T.

    Returns:
        [T, N] in the dtype of ``rows``.
    """
    num_tokens, n = slot_to_row.shape[0] // k, rows.shape[1]
    out = rows.new_empty(num_tokens, n)
    if out.numel():
        combine_kernel[(triton.cdiv(num_tokens, ROWS), triton.cdiv(n, COLUMNS))](
            rows,
            weights,
            slot_to_row,
            out,
            num_tokens,
            k,
            n,
            WEIGHTED=weights is not None,
            ACC=triton_dtype(accumulator(rows.dtype)),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
        )
    return out
