"""Backward through the down projection and the activation, in one grouped product.

    dh = W2[e]^T . dO[token]                     dO: the gradient of y, before the routing weight w
    dz = w * dh * act'(z)                        gated: [w dh act'(z1) z2,  w dh act(z1)]
    wh = w * h,  h = act(z) computed again       so that dW2 = dO^T wh needs no weighting
    dw = <dh, h>  (+ <dO, b2>, router_grad.py)   partial sums, one per column tile
    db1[e] = sum of dz over e's rows             partial sums, one per row tile

The partial sums are added in a fixed order, so that two runs agree to the last bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .config import Config
from .launch import COLUMNS, Plan, accumulator, expert_block, precision, row_major, triton_dtype
from .launch_config import config_for, math_of
from .numerics import activate, cast, columns_of, dot, gate, gate_backward
from .padded_plan import divides
from .tiles import find_tile, rows_of, swizzle, tile_bound


@triton.jit
def _finish(
    grad_h,  # [BM, N]
    n,  # [N] columns
    weight,  # [BM, 1]
    valid,  # [BM]
    z_ptr,  # this and the next three point to the tile's first row
    grad_z_ptr,
    weighted_h_ptr,
    sum_ptr,
    H,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    WANT_SUM: tl.constexpr,
    MATH: tl.constexpr,
):
    """Stores dz, w * h and the column sums of dz; returns <dh, h> of every row."""
    ACC: tl.constexpr = grad_h.dtype
    OUT: tl.constexpr = grad_z_ptr.dtype.element_ty
    row = tl.arange(0, grad_h.shape[0])[:, None]
    mask = valid[:, None] & (n < H)[None, :]
    at = row * (2 * H if GATED else H) + n[None, :]
    h, slope = activate(tl.load(z_ptr + at, mask=mask, other=0).to(ACC), ACT, MATH)
    weighted = grad_h * weight
    if GATED:
        z2 = tl.load(z_ptr + at + H, mask=mask, other=0).to(ACC)
        grad_z2 = gate_backward(weighted * h, z2, ACT)
        tl.store(grad_z_ptr + at + H, cast(grad_z2, OUT), mask=mask)
        if WANT_SUM:
            tl.store(sum_ptr + n + H, tl.sum(grad_z2, 0), mask=n < H)
        z2 = gate(z2, ACT)
        slope *= z2
        h *= z2
    tl.store(weighted_h_ptr + (row * H + n[None, :]), cast(h * weight, OUT), mask=mask)
    grad_z = weighted * slope
    tl.store(grad_z_ptr + at, cast(grad_z, OUT), mask=mask)
    if WANT_SUM:
        tl.store(sum_ptr + n, tl.sum(grad_z, 0), mask=n < H)
    return tl.sum(grad_h * h, 1)


@triton.jit(do_not_specialize=["S", "num_tiles"])
def grad_hidden_kernel(
    grad_ptr,  # [T, K] dO; by row [S, K]
    w_ptr,  # [E, K, H], any strides
    z_ptr,  # [S, H], gated [S, 2H]
    row_weight_ptr,  # [S] by slot
    grad_z_ptr,  # as z
    weighted_h_ptr,  # [S, H]
    dot_ptr,  # [column tiles, S]
    sum_ptr,  # [row tiles, width of z]
    offsets_ptr,  # [E + 1]
    row_to_token_ptr,  # [S]
    row_to_slot_ptr,  # [S]
    S,
    E,
    H,
    K,
    num_tiles,
    stride_grad,
    stride_we,
    stride_wk,
    stride_wn,
    E_BLOCK: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    WANT_SUM: tl.constexpr,
    GATHER: tl.constexpr,
    PADDED: tl.constexpr,
    EVEN_K: tl.constexpr,
    MATH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of BM rows by BN columns of dh."""
    tile, column = swizzle(tl.program_id(0), num_tiles, tl.cdiv(H, BN), GROUP)
    expert, first, end = find_tile(tile, offsets_ptr, E, E_BLOCK, BM)
    if expert >= E:
        return
    row, valid = rows_of(first, end, BM, PADDED)
    n = column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    source = row
    if GATHER:
        source = tl.load(row_to_token_ptr + row, mask=valid, other=0)
    grad = grad_ptr + source[:, None] * stride_grad + k[None, :]
    w = w_ptr + expert.to(tl.int64) * stride_we
    w = w + n.to(tl.int64)[None, :] * stride_wn + k.to(tl.int64)[:, None] * stride_wk
    grad_h = tl.zeros((BM, BN), ACC)
    for start in range(0, K, BK):
        grad_mask, w_mask = valid[:, None], (n < H)[None, :]
        if not EVEN_K:
            grad_mask = grad_mask & (k < K - start)[None, :]
            w_mask = w_mask & (k < K - start)[:, None]
        grad_tile = tl.load(grad, mask=grad_mask, other=0)
        grad_h = dot(grad_tile, tl.load(w, mask=w_mask, other=0), grad_h, PRECISION)
        grad += BK
        w += BK * stride_wk

    slot = tl.load(row_to_slot_ptr + row, mask=valid, other=0)
    weight = tl.load(row_weight_ptr + slot, mask=valid & (slot >= 0), other=0).to(ACC)[:, None]
    # The tile's base has 64 bits and offsets within it 32, which takes fewer registers.
    width = 2 * H if GATED else H
    z_ptr += first * width
    grad_z_ptr += first * width
    weighted_h_ptr += first * H
    sum_ptr += tile.to(tl.int64) * width
    dots = tl.zeros((BM,), ACC)
    WIDTH: tl.constexpr = BN // PARTS
    for part in tl.static_range(PARTS):
        dots += _finish(
            columns_of(grad_h, part, PARTS),
            column * BN + part * WIDTH + tl.arange(0, WIDTH),
            weight, valid, z_ptr, grad_z_ptr, weighted_h_ptr, sum_ptr, H,
            ACT, GATED, WANT_SUM, MATH,
        )  # fmt: skip
    tl.store(dot_ptr + column.to(tl.int64) * S + row, dots, mask=valid)


@triton.jit
def sum_tiles_kernel(
    partial_ptr,  # [row tiles, N]
    out_ptr,  # [E, N]
    offsets_ptr,
    N,
    BLOCK_M: tl.constexpr,  # rows per tile
    COLUMNS: tl.constexpr,
):
    """Adds the sums of one expert's row tiles, in a fixed order."""
    expert = tl.program_id(0)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tile = tl.zeros((), tl.int64)  # the expert's first tile: the number of tiles before it
    for before in range(0, expert):
        rows = tl.load(offsets_ptr + before + 1) - tl.load(offsets_ptr + before)
        tile += (rows + BLOCK_M - 1) // BLOCK_M
    rows = tl.load(offsets_ptr + expert + 1) - tl.load(offsets_ptr + expert)
    total = tl.zeros((COLUMNS,), partial_ptr.dtype.element_ty)
    for _ in range(0, rows, BLOCK_M):
        total += tl.load(partial_ptr + tile * N + n, mask=n < N, other=0)
        tile += 1
    out = out_ptr + expert.to(tl.int64) * N + n
    tl.store(out, cast(total, out_ptr.dtype.element_ty), mask=n < N)


def grad_hidden(
    grad: Tensor,
    weight: Tensor,
    z: Tensor,
    row_weights: Tensor,
    plan: Plan,
    *,
    act: str,
    gated: bool,
    want_bias: bool,
    gather: bool = True,
    padded: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dz, w * h, the parts of <dh, h> and db1; rows from ``expert_offsets[E]`` on are not written.

    Args:
        grad: [T, K], the gradient of y; without ``gather`` [S, K] by row.
        weight: [E, K, H], the down projection, any strides.
        z: [S, H], gated [S, 2H], of :func:`.up_projection.up_projection`.
        row_weights: [S] by slot, float32 or float64.
        want_bias: whether db1 is wanted; otherwise it is empty.
        padded: whether the offsets are those of a padded plan.
        config: tile sizes; ``None``: the table's or the heuristic's.

    Returns:
        dz, as z; w * h [S, H]; partial dots [column tiles, S] in the accumulator's dtype;
        db1 [E, H], gated [E, 2H], or [E, 0].
    """
    expert_offsets, row_to_token, _ = plan
    num_rows, (num_experts, k, hidden) = row_to_token.shape[0], weight.shape
    kernel = "gated_grad_hidden" if gated else "grad_hidden"
    config = config or config_for(kernel, grad, hidden, k, num_rows // num_experts)
    acc = accumulator(grad.dtype)
    num_tiles = tile_bound(num_rows, num_experts, config.block_m)
    columns = triton.cdiv(hidden, config.block_n)
    grad_z, weighted_h = z.new_empty(z.shape), z.new_empty(num_rows, hidden)
    dots = z.new_empty(columns, num_rows, dtype=acc)
    width = z.shape[1] if want_bias else 0
    partial_sums = z.new_empty(num_tiles, width, dtype=acc)
    bias_grad = z.new_empty(num_experts, width)
    grad = row_major(grad)
    if num_rows and hidden:
        grad_hidden_kernel[(num_tiles * columns,)](
            grad,
            weight,
            z,
            row_weights,
            grad_z,
            weighted_h,
            dots,
            partial_sums,
            *plan,
            num_rows,
            num_experts,
            hidden,
            k,
            num_tiles,
            grad.stride(0),
            *weight.stride(),
            E_BLOCK=expert_block(num_experts),
            ACT=act,
            GATED=gated,
            WANT_SUM=want_bias,
            GATHER=gather,
            PADDED=padded and divides(config.block_m),
            EVEN_K=k % config.block_k == 0,
            MATH=math_of(grad),
            PRECISION=precision(grad.dtype),
            ACC=triton_dtype(acc),
            PARTS=config.parts,
            **config.meta(),
        )
    if bias_grad.numel():
        sum_tiles_kernel[(num_experts, triton.cdiv(width, COLUMNS))](
            partial_sums,
            bias_grad,
            expert_offsets,
            width,
            BLOCK_M=config.block_m,
            COLUMNS=COLUMNS,
        )
    return grad_z, weighted_h, dots, bias_grad
