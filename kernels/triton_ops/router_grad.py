"""Gradient of the routing weights, by slot; 0 where the slot is skipped.

    dw[slot(r)] = p[r] + <u[r], v[token]> + <dO[token], bias[e]>

p: partial sums that another kernel stored. Each of the three terms may be absent.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import COLUMNS, Plan, accumulator, expert_block, row_major, triton_dtype
from .tiles import find_tile, tile_bound

_BLOCK = 16  # rows per program


@triton.jit(do_not_specialize=["S", "parts", "num_tiles"])
def router_grad_kernel(
    partial_ptr,  # [parts, S]
    u_ptr,  # [S, M]
    v_ptr,  # [T, M]
    grad_ptr,  # [T, N] dO
    bias_ptr,  # [E, N]
    out_ptr,  # [S] by slot
    offsets_ptr,
    row_to_token_ptr,
    row_to_slot_ptr,
    S,
    E,
    M,
    N,
    parts,
    num_tiles,
    stride_v,
    stride_grad,
    HAS_PARTIAL: tl.constexpr,
    HAS_DOT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
    E_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """BLOCK rows of one expert; the programs after the last tile set skipped slots to zero."""
    pid = tl.program_id(0)
    if pid >= num_tiles:
        row = (pid - num_tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        skipped = (row < S) & (row >= tl.load(offsets_ptr + E))
        slot = tl.load(row_to_slot_ptr + row, mask=skipped, other=0)
        skipped = skipped & (slot >= 0)
        tl.store(out_ptr + slot, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask=skipped)
        return
    expert, first, end = find_tile(pid, offsets_ptr, E, E_BLOCK, BLOCK)
    if expert >= E:
        return
    row = first + tl.arange(0, BLOCK)
    valid = row < end
    token = tl.load(row_to_token_ptr + row, mask=valid, other=0)
    valid = valid & (token >= 0)
    total = tl.zeros((BLOCK,), ACC)
    if HAS_PARTIAL:
        for part in range(0, parts):
            total += tl.load(partial_ptr + tl.cast(part, tl.int64) * S + row, mask=valid, other=0)
    if HAS_DOT:
        for start in range(0, M, COLUMNS):
            m = start + tl.arange(0, COLUMNS)
            mask = valid[:, None] & (m < M)[None, :]
            u = tl.load(u_ptr + row[:, None] * M + m[None, :], mask=mask, other=0).to(ACC)
            v = tl.load(v_ptr + token[:, None] * stride_v + m[None, :], mask=mask, other=0).to(ACC)
            total += tl.sum(u * v, 1)
    if HAS_BIAS:
        for start in range(0, N, COLUMNS):
            n = start + tl.arange(0, COLUMNS)
            mask = valid[:, None] & (n < N)[None, :]
            grad = tl.load(grad_ptr + token[:, None] * stride_grad + n[None, :], mask=mask, other=0)
            bias = tl.load(bias_ptr + expert.to(tl.int64) * N + n, mask=n < N, other=0)
            total += tl.sum(grad.to(ACC) * bias.to(ACC)[None, :], 1)
    slot = tl.load(row_to_slot_ptr + row, mask=valid, other=0)
    tl.store(out_ptr + slot, total, mask=valid)


def router_grad(
    partial: Tensor | None,
    dot: tuple[Tensor, Tensor] | None,
    grad: Tensor,
    bias: Tensor | None,
    top_k_weights: Tensor,
    plan: Plan,
) -> Tensor:
    """The gradient of ``top_k_weights``.

    Args:
        partial: [parts, S] in the accumulator's dtype, or ``None``.
        dot: u [S, M] contiguous and v [T, M], or ``None``.
        grad, bias: dO [T, N] and [E, N], or ``None`` for no bias term.

    Returns:
        [T, K] in the dtype of ``top_k_weights``.
    """
    expert_offsets, row_to_token, _ = plan
    num_rows, num_experts = row_to_token.shape[0], expert_offsets.shape[0] - 1
    out = top_k_weights.new_empty(top_k_weights.shape)
    if not num_rows:
        return out
    u, v = dot if dot is not None else (None, None)
    v = None if v is None else row_major(v)
    grad = row_major(grad)
    num_tiles = tile_bound(num_rows, num_experts, _BLOCK)
    router_grad_kernel[(num_tiles + triton.cdiv(num_rows, _BLOCK),)](
        partial,
        u,
        v,
        grad,
        None if bias is None else bias.contiguous(),
        out,
        *plan,
        num_rows,
        num_experts,
        0 if u is None else u.shape[1],
        grad.shape[1],
        0 if partial is None else partial.shape[0],
        num_tiles,
        0 if v is None else v.stride(0),
        grad.stride(0),
        HAS_PARTIAL=partial is not None,
        HAS_DOT=dot is not None,
        HAS_BIAS=bias is not None,
        ACC=triton_dtype(accumulator(grad.dtype)),
        E_BLOCK=expert_block(num_experts),
        BLOCK=_BLOCK,
        COLUMNS=COLUMNS,
    )
    return out
