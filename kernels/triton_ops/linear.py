"""Grouped product: applies to every row the linear map of its expert.

    out[r] = weight[r] * (W[e] . a[r] + bias[e])        for the rows r of expert e

``a`` is read by row, or gathered by token; ``out`` is written by row, or directly in token order.
The down projection, input gradients and ``expert_linear`` are all computed by this product.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch_config
from .config import Config, heuristic
from .descriptors import is_transposed, load_weight, row_descriptor, weight_descriptor
from .grouped_mm import grouped_linear
from .launch import Plan, accumulator, expert_block, precision, row_major, triton_dtype
from .launch_config import config_for
from .numerics import cast, dot
from .padded_plan import PaddedPlan, divides
from .persistent_linear import persistent_linear
from .tiles import find_tile, rows_of, swizzle, tile_bound
from .zero_tail import zero_tail


@triton.jit(do_not_specialize=["num_tiles"])
def linear_kernel(
    a_ptr,  # [T or S, K], or its descriptor, by row
    w_ptr,  # [E, N, K], any strides, or its descriptor
    bias_ptr,  # [E, N]
    row_weight_ptr,  # [S] by slot
    out_ptr,  # [T or S, N]
    offsets_ptr,  # [E + 1]
    row_to_token_ptr,  # [S]
    row_to_slot_ptr,  # [S]
    E,
    N,
    K,
    num_tiles,
    stride_a,
    stride_we,
    stride_wn,
    stride_wk,
    E_BLOCK: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PADDED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of BM rows by BN columns."""
    tile, column = swizzle(tl.program_id(0), num_tiles, tl.cdiv(N, BN), GROUP)
    expert, first, end = find_tile(tile, offsets_ptr, E, E_BLOCK, BM)
    if expert >= E:
        return
    row, valid = rows_of(first, end, BM, PADDED)
    n = column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), ACC)
    if DESCRIPTORS:
        for start in range(0, K, BK):
            w_tile = load_weight(w_ptr, expert, column * BN, start, TRANSPOSED, BN, BK)
            acc = dot(a_ptr.load([first.to(tl.int32), start]), w_tile, acc, PRECISION)
    else:
        source = row
        if GATHER:
            source = tl.load(row_to_token_ptr + row, mask=valid, other=0)
        a = a_ptr + source[:, None] * stride_a + k[None, :]
        w = w_ptr + expert.to(tl.int64) * stride_we
        w = w + n.to(tl.int64)[None, :] * stride_wn + k.to(tl.int64)[:, None] * stride_wk
        for start in range(0, K, BK):
            a_mask, w_mask = valid[:, None], (n < N)[None, :]
            if not EVEN_K:
                a_mask = a_mask & (k < K - start)[None, :]
                w_mask = w_mask & (k < K - start)[:, None]
            a_tile = tl.load(a, mask=a_mask, other=0)
            acc = dot(a_tile, tl.load(w, mask=w_mask, other=0), acc, PRECISION)
            a += BK
            w += BK * stride_wk
    if HAS_BIAS:
        acc += tl.load(bias_ptr + expert.to(tl.int64) * N + n, mask=n < N, other=0).to(ACC)[None, :]
    if WEIGHTED:
        slot = tl.load(row_to_slot_ptr + row, mask=valid, other=0)
        acc *= tl.load(row_weight_ptr + slot, mask=valid & (slot >= 0), other=0).to(ACC)[:, None]
    target = row
    if SCATTER:
        target = tl.load(row_to_token_ptr + row, mask=valid, other=0)
        valid = valid & (target >= 0)
    out = out_ptr + target[:, None] * N + n[None, :]
    tl.store(out, cast(acc, out_ptr.dtype.element_ty), mask=valid[:, None] & (n < N)[None, :])


def linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weights: Tensor | None,
    plan: Plan,
    *,
    gather: bool,
    scatter: bool,
    padded: PaddedPlan | None = None,
    config: Config | None = None,
) -> Tensor:
    """The grouped product; without ``scatter``, rows from ``expert_offsets[E]`` on are not written.

    Args:
        a: [S, K]; with ``gather`` [T, K].
        weight: [E, N, K] in a's dtype, any strides.
        bias: [E, N] or ``None``.
        row_weights: [S] by slot, float32 or float64, or ``None`` for 1.
        plan: see :data:`.launch.Plan`.
        scatter: write row r at its token, and zeros at the tokens of skipped rows. Every token
            must have exactly one row.
        padded: the padded plan that ``plan`` is part of, or ``None``.
        config: tile sizes; ``None``: the table's or the heuristic's.

    Returns:
        [S, N] in a's dtype; with ``scatter`` [T, N] by token.
    """
    expert_offsets, row_to_token, _ = plan
    num_rows, (num_experts, n, k) = row_to_token.shape[0], weight.shape
    slots = None if padded is None else padded.slot_to_row
    out = a.new_empty(num_rows if slots is None or not scatter else slots.shape[0], n)
    if not out.numel():
        return out
    kernel = "linear" if weight.stride(-1) == 1 else "linear_transposed"
    config = config or config_for(kernel, a, n, k, num_rows // num_experts)
    if config.implementation == "grouped_mm":
        return grouped_linear(
            a, weight, bias, row_weights, plan, out if scatter else None, gather=gather
        )
    if config.persistent and padded is None:
        config = heuristic(
            kernel, a.dtype, launch_config.target_of(a.device.index), n, k, num_rows // num_experts
        )
    a, bias = row_major(a), None if bias is None else bias.contiguous()
    if config.persistent:
        assert padded is not None
        persistent_linear(a, weight, bias, row_weights, padded, out, config, scatter=scatter)
        return zero_tail(out, expert_offsets, row_to_token, by_token=True) if scatter else out
    a_rows, w_tiles = a, weight
    if config.descriptors:
        a_rows = row_descriptor(a, row_to_token if gather else None, config)
        w_tiles = weight_descriptor(weight, config)
    num_tiles = tile_bound(num_rows, num_experts, config.block_m)
    linear_kernel[(num_tiles * triton.cdiv(n, config.block_n),)](
        a_rows,
        w_tiles,
        bias,
        row_weights,
        out,
        *plan,
        num_experts,
        n,
        k,
        num_tiles,
        a.stride(0),
        *weight.stride(),
        E_BLOCK=expert_block(num_experts),
        GATHER=gather,
        SCATTER=scatter,
        HAS_BIAS=bias is not None,
        WEIGHTED=row_weights is not None,
        PADDED=padded is not None and divides(config.block_m),
        DESCRIPTORS=config.descriptors,
        TRANSPOSED=is_transposed(weight),
        EVEN_K=k % config.block_k == 0,
        PRECISION=precision(a.dtype),
        ACC=triton_dtype(accumulator(a.dtype)),
        **config.meta(),
    )
    return zero_tail(out, expert_offsets, row_to_token, by_token=True) if scatter else out
