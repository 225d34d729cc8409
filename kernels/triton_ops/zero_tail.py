"""Writes zeros for the skipped slots: to the rows after the last expert's, or to their tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import COLUMNS, ROWS


@triton.jit(do_not_specialize=["S"])
def zero_tail_kernel(
    out_ptr,  # [S, N], or [T, N] by token
    offsets_ptr,  # [E + 1]
    row_to_token_ptr,  # [S]
    S,
    E,
    N,
    BY_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS rows; most programs return without writing."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    skipped = (row < S) & (row >= tl.load(offsets_ptr + E))
    if tl.max(skipped.to(tl.int32), 0) == 0:
        return
    if BY_TOKEN:
        row = tl.load(row_to_token_ptr + row, mask=skipped, other=0)
        skipped = skipped & (row >= 0)
    zeros = tl.zeros((ROWS, COLUMNS), out_ptr.dtype.element_ty)
    for start in range(0, N, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        out = out_ptr + row[:, None] * N + n[None, :]
        tl.store(out, zeros, mask=skipped[:, None] & (n < N)[None, :])


def zero_tail(
    out: Tensor, expert_offsets: Tensor, row_to_token: Tensor, *, by_token: bool
) -> Tensor:
    """Write the zeros into ``out``, contiguous, and return it.

    Args:
        out: [S, N]; ``by_token`` [T, N] where every token has one row.
    """
    num_rows, n = row_to_token.shape[0], out.shape[1]
    if out.numel():
        zero_tail_kernel[(triton.cdiv(num_rows, ROWS),)](
            out,
            expert_offsets,
            row_to_token,
            num_rows,
            expert_offsets.shape[0] - 1,
            n,
            BY_TOKEN=by_token,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
        )
    return out
