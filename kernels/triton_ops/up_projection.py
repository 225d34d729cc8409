"""Up projection of the expert MLP, fused with its bias and activation.

    z = W1[e] . x[token] + b1[e];  h = act(z);  gated: z = [z1, z2], h = act(z1) * z2

The loads gather the rows of x, unless these are sorted already. z is rounded before it is
activated, so that the backward pass, which reads z, computes the same h.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .config import Config
from .descriptors import is_transposed, load_weight, row_descriptor, weight_descriptor
from .launch import accumulator, expert_block, precision, row_major, triton_dtype
from .launch_config import config_for, math_of
from .numerics import activate, cast, columns_of, dot, gate
from .padded_plan import divides
from .tiles import find_tile, rows_of, swizzle, tile_bound
from .zero_tail import zero_tail


@triton.jit
def _finish(
    z1,  # [BM, N] without bias
    z2,  # [BM, N], for the gate
    n,  # [N] columns
    valid,  # [BM]
    bias_ptr,  # the expert's
    z_ptr,  # this and the next point to the tile's first row
    h_ptr,
    H,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_Z: tl.constexpr,
    STORE_H: tl.constexpr,
    MATH: tl.constexpr,
):
    """Adds the bias, and stores z and h."""
    ACC: tl.constexpr = z1.dtype
    OUT: tl.constexpr = h_ptr.dtype.element_ty
    row = tl.arange(0, z1.shape[0])[:, None]
    mask = valid[:, None] & (n < H)[None, :]
    at = row * (2 * H if GATED else H) + n[None, :]
    if HAS_BIAS:
        z1 += tl.load(bias_ptr + n, mask=n < H, other=0).to(ACC)[None, :]
    z1 = cast(z1, OUT)
    if STORE_Z:
        tl.store(z_ptr + at, z1, mask=mask)
    if GATED:
        if HAS_BIAS:
            z2 += tl.load(bias_ptr + H + n, mask=n < H, other=0).to(ACC)[None, :]
        z2 = cast(z2, OUT)
        if STORE_Z:
            tl.store(z_ptr + at + H, z2, mask=mask)
    if STORE_H:
        h, _ = activate(z1.to(ACC), ACT, MATH)
        if GATED:
            h *= gate(z2.to(ACC), ACT)
        tl.store(h_ptr + (row * H + n[None, :]), cast(h, OUT), mask=mask)


@triton.jit(do_not_specialize=["num_tiles"])
def up_kernel(
    x_ptr,  # [T, K]; by row [S, K], or their descriptor
    w_ptr,  # [E, H, K], gated [E, 2H, K], any strides, or its descriptor
    bias_ptr,  # [E, H], gated [E, 2H]
    z_ptr,  # [S, H], gated [S, 2H]
    h_ptr,  # [S, H]
    offsets_ptr,  # [E + 1]
    row_to_token_ptr,  # [S]
    E,
    H,
    K,
    num_tiles,
    stride_x,
    stride_we,
    stride_wn,
    stride_wk,
    E_BLOCK: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_Z: tl.constexpr,
    STORE_H: tl.constexpr,
    GATHER: tl.constexpr,
    PADDED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
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
    """One tile of BM rows by BN columns of h; with a gate, of both halves of z."""
    tile, column = swizzle(tl.program_id(0), num_tiles, tl.cdiv(H, BN), GROUP)
    expert, first, end = find_tile(tile, offsets_ptr, E, E_BLOCK, BM)
    if expert >= E:
        return
    row, valid = rows_of(first, end, BM, PADDED)
    n = column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), ACC)
    if GATED:
        acc2 = tl.zeros((BM, BN), ACC)
    if DESCRIPTORS:
        for start in range(0, K, BK):
            x_tile = x_ptr.load([first.to(tl.int32), start])
            w_tile = load_weight(w_ptr, expert, column * BN, start, TRANSPOSED, BN, BK)
            acc = dot(x_tile, w_tile, acc, PRECISION)
            if GATED:
                w_tile = load_weight(w_ptr, expert, H + column * BN, start, TRANSPOSED, BN, BK)
                acc2 = dot(x_tile, w_tile, acc2, PRECISION)
    else:
        source = row
        if GATHER:
            source = tl.load(row_to_token_ptr + row, mask=valid, other=0)
        x = x_ptr + source[:, None] * stride_x + k[None, :]
        w = w_ptr + expert.to(tl.int64) * stride_we
        w = w + n.to(tl.int64)[None, :] * stride_wn + k.to(tl.int64)[:, None] * stride_wk
        second = tl.cast(H, tl.int64) * stride_wn
        for start in range(0, K, BK):
            x_mask, w_mask = valid[:, None], (n < H)[None, :]
            if not EVEN_K:
                x_mask = x_mask & (k < K - start)[None, :]
                w_mask = w_mask & (k < K - start)[:, None]
            x_tile = tl.load(x, mask=x_mask, other=0)
            acc = dot(x_tile, tl.load(w, mask=w_mask, other=0), acc, PRECISION)
            if GATED:
                acc2 = dot(x_tile, tl.load(w + second, mask=w_mask, other=0), acc2, PRECISION)
            x += BK
            w += BK * stride_wk

    # The tile's base has 64 bits and offsets within it 32, which takes fewer registers.
    width = 2 * H if GATED else H
    z_ptr += first * width
    h_ptr += first * H
    if HAS_BIAS:
        bias_ptr += expert.to(tl.int64) * width
    WIDTH: tl.constexpr = BN // PARTS
    for part in tl.static_range(PARTS):
        z1 = columns_of(acc, part, PARTS)
        z2 = columns_of(acc2, part, PARTS) if GATED else z1
        n = column * BN + part * WIDTH + tl.arange(0, WIDTH)
        _finish(
            z1, z2, n, valid, bias_ptr, z_ptr, h_ptr, H,
            ACT, GATED, HAS_BIAS, STORE_Z, STORE_H, MATH,
        )  # fmt: skip


def up_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_offsets: Tensor,
    row_to_token: Tensor,
    *,
    act: str,
    gated: bool,
    want_z: bool,
    want_h: bool,
    gather: bool = True,
    padded: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """z and h of all rows; from row ``expert_offsets[E]`` on, z is 0 and h is not written.

    Args:
        x: [T, K]; without ``gather`` [S, K] by row.
        weight: [E, H, K], gated [E, 2H, K], in x's dtype, any strides.
        bias: [E, H], gated [E, 2H], or ``None``.
        act: "gelu", "gelu_tanh", "silu", "relu" or "clamped_swiglu".
        want_z, want_h: which of the two to compute; the other has no rows.
        padded: whether the offsets are those of a padded plan.
        config: tile sizes; ``None``: the table's or the heuristic's.

    Returns:
        z [S, H], gated [S, 2H], and h [S, H], in x's dtype.
    """
    num_rows, (num_experts, width, k) = row_to_token.shape[0], weight.shape
    hidden = width // 2 if gated else width
    z = x.new_empty(num_rows if want_z else 0, width)
    h = x.new_empty(num_rows if want_h else 0, hidden)
    kernel = "gated_up" if gated else "up"
    config = config or config_for(kernel, x, hidden, k, num_rows // num_experts)
    num_tiles = tile_bound(num_rows, num_experts, config.block_m)
    token = row_to_token if gather else None
    if not num_rows or not hidden:
        return z, h
    x, bias = row_major(x), None if bias is None else bias.contiguous()
    x_rows, w_tiles = x, weight
    if config.descriptors:
        x_rows, w_tiles = row_descriptor(x, token, config), weight_descriptor(weight, config)
    up_kernel[(num_tiles * triton.cdiv(hidden, config.block_n),)](
        x_rows,
        w_tiles,
        bias,
        z,
        h,
        expert_offsets,
        row_to_token,
        num_experts,
        hidden,
        k,
        num_tiles,
        x.stride(0),
        *weight.stride(),
        E_BLOCK=expert_block(num_experts),
        ACT=act,
        GATED=gated,
        HAS_BIAS=bias is not None,
        STORE_Z=want_z,
        STORE_H=want_h,
        GATHER=gather,
        PADDED=padded and divides(config.block_m),
        DESCRIPTORS=config.descriptors,
        TRANSPOSED=is_transposed(weight),
        EVEN_K=k % config.block_k == 0,
        MATH=math_of(x),
        PRECISION=precision(x.dtype),
        ACC=triton_dtype(accumulator(x.dtype)),
        PARTS=config.parts,
        **config.meta(),
    )
    return zero_tail(z, expert_offsets, row_to_token, by_token=False) if want_z else z, h
