"""Gradient of stacked weights: a grouped product over each expert's rows.

    dW[e] = sum over e's rows of (w) a[r]^T b[r]         [E, M, N]

An expert's rows are divided into SPLITS runs, so that few experts also fill the GPU; the sums of
the runs are added in a fixed order. Experts without rows get zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .config import Config
from .grouped_mm import grouped_weight
from .launch import Plan, accumulator, precision, row_major, triton_dtype
from .launch_config import config_for
from .numerics import cast, dot
from .padded_plan import divides
from .split_sum import split_sum
from .tiles import rows_of, swizzle

# The least number of programs to aim for, twice an H200's 132 multiprocessors, and the most runs.
_PROGRAMS, _MOST_SPLITS = 264, 16


@triton.jit(do_not_specialize=["splits"])
def grad_weight_kernel(
    a_ptr,  # [T or S, M]
    b_ptr,  # [T or S, N]
    row_weight_ptr,  # [S] by slot
    out_ptr,  # [splits, E, M, N]
    offsets_ptr,  # [E + 1]
    row_to_token_ptr,  # [S]
    row_to_slot_ptr,  # [S]
    splits,
    E,
    M,
    N,
    stride_a,
    stride_b,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of BM by BN of one expert's gradient, over one run of its rows."""
    per_expert = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    which = tl.program_id(0) // per_expert
    expert, split = which // splits, which % splits
    tile_m, tile_n = swizzle(tl.program_id(0) % per_expert, tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    first = tl.load(offsets_ptr + expert)
    last = tl.load(offsets_ptr + expert + 1)
    run = tl.cdiv(tl.cdiv(last - first, BK), splits) * BK
    first += split * run
    last = tl.minimum(last, first + run)
    acc = tl.zeros((BM, BN), ACC)
    for start in range(first, last, BK):
        row, valid = rows_of(start, last, BK, PADDED)
        a_row, b_row = row, row
        if GATHER_A or GATHER_B:
            token = tl.load(row_to_token_ptr + row, mask=valid, other=0)
            if GATHER_A:
                a_row = token
            if GATHER_B:
                b_row = token
        a = a_ptr + a_row[None, :] * stride_a + m[:, None]
        b = b_ptr + b_row[:, None] * stride_b + n[None, :]
        a_tile = tl.load(a, mask=valid[None, :] & (m < M)[:, None], other=0)
        b_tile = tl.load(b, mask=valid[:, None] & (n < N)[None, :], other=0)
        if WEIGHTED:
            slot = tl.load(row_to_slot_ptr + row, mask=valid, other=0)
            weight = tl.load(row_weight_ptr + slot, mask=valid, other=0).to(ACC)
            a_tile = cast(a_tile.to(ACC) * weight[None, :], a_ptr.dtype.element_ty)
        acc = dot(a_tile, b_tile, acc, PRECISION)
    out = out_ptr + (split * E + expert).to(tl.int64) * M * N
    out = out + m.to(tl.int64)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out, cast(acc, out_ptr.dtype.element_ty), mask=mask)


def splits_for(num_experts: int, m: int, n: int, num_rows: int, config: Config) -> int:
    """The number of runs of an expert's rows: a power of two that follows from shapes alone."""
    tiles = num_experts * triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    splits = 1
    while (
        splits < _MOST_SPLITS
        and tiles * splits < _PROGRAMS
        # A run shorter than a few steps of the product costs more than it gains.
        and num_rows // num_experts >= 8 * splits * config.block_k
    ):
        splits *= 2
    return splits


def grad_weight(
    a: Tensor,
    b: Tensor,
    row_weights: Tensor | None,
    plan: Plan,
    *,
    gather_a: bool,
    gather_b: bool,
    padded: bool = False,
    config: Config | None = None,
    splits: int | None = None,
) -> Tensor:
    """The gradient of the weights.

    Args:
        a, b: [S, M] and [S, N] in one dtype; gathered [T, M] and [T, N].
        row_weights: [S] by slot, the factors of a's rows, or ``None`` for 1.
        padded: whether the offsets are those of a padded plan. Rows that pad must then be 0 in
            one of a and b, and finite in the other.
        config: tile sizes (block_k: rows per step); ``None``: the table's or the heuristic's.
        splits: runs per expert; ``None``: :func:`splits_for`.

    Returns:
        [E, M, N] in a's dtype.
    """
    expert_offsets, row_to_token, _ = plan
    num_rows, num_experts = row_to_token.shape[0], expert_offsets.shape[0] - 1
    m, n = a.shape[1], b.shape[1]
    out = a.new_empty(num_experts, m, n)
    if not out.numel():
        return out
    gathered = gather_a or gather_b
    config = config or config_for("grad_weight", a, n, m, num_rows // num_experts, gathered)
    if config.implementation == "grouped_mm":
        return grouped_weight(a, b, row_weights, plan, gather_a=gather_a, gather_b=gather_b)
    splits = splits or splits_for(num_experts, m, n, num_rows, config)
    acc = accumulator(a.dtype)
    target = out if splits == 1 else out.new_empty(splits, *out.shape, dtype=acc)
    a, b = row_major(a), row_major(b)
    tiles = num_experts * triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    grad_weight_kernel[(tiles * splits,)](
        a,
        b,
        row_weights,
        target,
        *plan,
        splits,
        num_experts,
        m,
        n,
        a.stride(0),
        b.stride(0),
        GATHER_A=gather_a,
        GATHER_B=gather_b,
        WEIGHTED=row_weights is not None,
        PADDED=padded and divides(config.block_k),
        PRECISION=precision(a.dtype),
        ACC=triton_dtype(acc),
        **config.meta(),
    )
    return out if splits == 1 else split_sum(target, out)
