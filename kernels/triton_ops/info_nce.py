"""Row and column sums over the logits of the contrastive loss, from one product.

Each tile of logits is reduced along both axes and not stored:

    NEG                      log2 sum exp2 over the negatives
    POS, POS_SUM, POS_COUNT  over the positives, with groups; otherwise the diagonal is the positive
    ALL_SUM, ALL_COUNT       over both, for label smoothing
    rank                     the number of negatives that are not below the own logit

Cosines need one exponential per pair: relative to the largest possible logit it serves both axes.
The scale is on the GPU; kernels look at it, and take one per axis for scales above 43.

Each tile stores its sums at a place of its own, ``[tiles, statistics, rows]`` and ``[tiles,
statistics, columns]``. The caller adds them in a fixed order, so that there are no atomics and
every run gives the same bits. A second pass for the columns would cost another product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Config
from .launch import accumulator
from .launch_config import exp2_of
from .logits import (
    MASKED,
    NARROW,
    Area,
    Masks,
    Side,
    config_of,
    largest_logit,
    operands,
    parts_of,
    product,
    product_meta,
    scaled,
    sizes,
    take_part,
)
from .numerics import columns_of, exp2
from .tiles import swizzle

STATISTICS = 6
_NEG, _POS, _POS_SUM, _POS_COUNT, _ALL_SUM, _ALL_COUNT = (tl.constexpr(i) for i in range(6))


@triton.jit(do_not_specialize=["M"])
def own_logits_kernel(
    q_ptr,  # [M, D]
    k_ptr,  # [M, D]
    scale_ptr,  # []
    q_norm_ptr,  # [M]
    k_norm_ptr,  # [M]
    out_ptr,  # [M]
    M,
    D,
    stride_q,
    stride_k,
    COSINE: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The diagonal of BM rows, from tiles as ``info_nce_kernel`` computes them.

    The hardware adds the terms of tiles of another width in another order; equal pairs would then
    not tie.
    """
    first = tl.program_id(0) * BM
    row = first + tl.arange(0, BM)
    own = tl.zeros((BM,), ACC)
    WIDTH: tl.constexpr = BN // PARTS
    for tile in tl.static_range((BM + BN - 1) // BN):  # tl.cdiv is no constant on Triton 3.6
        col0 = (first + tile * BN) // BN * BN
        acc = product(
            q_ptr, k_ptr, row, col0 + tl.arange(0, BN), M, M, D, stride_q, stride_k,
            EVEN_D, PRECISION, ACC, BK,
        )  # fmt: skip
        for part in tl.static_range(PARTS):
            col = col0 + part * WIDTH + tl.arange(0, WIDTH)
            s = scaled(
                columns_of(acc, part, PARTS), scale_ptr, q_norm_ptr, k_norm_ptr,
                row, col, M, M, COSINE,
            )  # fmt: skip
            own += tl.sum(tl.where(row[:, None] == col[None, :], s, 0.0), 1)
    tl.store(out_ptr + row, own, mask=row < M)


@triton.jit
def log2_sum_exp2(s, AXIS: tl.constexpr, MATH: tl.constexpr):
    """log2 of the sum of exp2 over an axis of s; about MASKED if all entries are masked."""
    top = tl.max(s, AXIS)
    return top + tl.log2(tl.sum(exp2(s - tl.expand_dims(top, AXIS), MATH), AXIS))


@triton.jit
def log2_of(total, largest):
    """log2 of sums that were computed relative to ``largest``; MASKED where all is masked."""
    return tl.where(total == 0, MASKED, tl.log2(total) + largest)


@triton.jit
def log2_sums(s, largest, COSINE: tl.constexpr, COLUMNS: tl.constexpr, MATH: tl.constexpr):
    """log2 of the sums of exp2 over the rows and, with COLUMNS, over the columns of s."""
    if COSINE and COLUMNS:
        if largest <= NARROW:
            value = exp2(s - largest, MATH)
            of_row, of_col = log2_of(tl.sum(value, 1), largest), log2_of(tl.sum(value, 0), largest)
        else:
            of_row, of_col = log2_sum_exp2(s, 1, MATH), log2_sum_exp2(s, 0, MATH)
    else:
        of_row = log2_sum_exp2(s, 1, MATH)
        of_col = log2_sum_exp2(s, 0, MATH) if COLUMNS else of_row
    return of_row, of_col


@triton.jit
def store_sums(
    s,
    positive,
    kept,
    negatives,  # log2 of their sums
    positives,
    out_ptr,  # at this tile's first statistic
    at,  # the index within a statistic
    size,  # from one statistic to the next
    mask,
    AXIS: tl.constexpr,
    GROUPS: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """The statistics of a tile along one axis."""
    ACC: tl.constexpr = s.dtype
    out = out_ptr + at
    tl.store(out + _NEG * size, negatives, mask=mask)
    if GROUPS:
        tl.store(out + _POS * size, positives, mask=mask)
        tl.store(out + _POS_SUM * size, tl.sum(tl.where(positive, s, 0.0), AXIS), mask=mask)
        tl.store(out + _POS_COUNT * size, tl.sum(positive.to(ACC), AXIS), mask=mask)
    if SMOOTH:
        tl.store(out + _ALL_SUM * size, tl.sum(tl.where(kept, s, 0.0), AXIS), mask=mask)
        tl.store(out + _ALL_COUNT * size, tl.sum(kept.to(ACC), AXIS), mask=mask)


@triton.jit
def reduce_tile(
    acc,
    scale_ptr,
    q_norm_ptr,
    k_norm_ptr,
    row_ids_ptr,
    col_ids_ptr,
    own_ptr,
    row_sums_ptr,  # [column parts, statistics, rows]
    col_sums_ptr,  # [row tiles, statistics, columns]
    rank_ptr,  # [column parts, rows]
    row,
    col,
    row_tile,
    col_part,
    row0,
    row_end,
    col0,
    col_end,
    M,
    N,
    COSINE: tl.constexpr,
    OWN: tl.constexpr,
    TEXTS: tl.constexpr,
    ANCHORS: tl.constexpr,
    DOMAINS: tl.constexpr,
    GROUPS: tl.constexpr,
    SMOOTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    STATS: tl.constexpr,
    MATH: tl.constexpr,
):
    """Computes the row and column sums of a tile, or of a part of its columns."""
    s = scaled(acc, scale_ptr, q_norm_ptr, k_norm_ptr, row, col, row_end, col_end, COSINE)
    positive, kept = take_part(
        row_ids_ptr, col_ids_ptr, row, col, row_end, col_end, M, N,
        OWN, TEXTS, ANCHORS, DOMAINS, GROUPS,
    )  # fmt: skip
    largest = largest_logit(scale_ptr, s.dtype)
    negatives = tl.where(kept & (positive == 0), s, MASKED)
    row_neg, col_neg = log2_sums(negatives, largest, COSINE, COLUMNS, MATH)
    row_pos, col_pos = row_neg, col_neg
    if GROUPS:
        positives = tl.where(positive, s, MASKED)
        row_pos, col_pos = log2_sums(positives, largest, COSINE, COLUMNS, MATH)
    rows, part = row_end - row0, tl.cast(col_part, tl.int64)
    store_sums(
        s, positive, kept, row_neg, row_pos, row_sums_ptr + part * STATS * rows,
        row - row0, rows, row < row_end, 1, GROUPS, SMOOTH,
    )  # fmt: skip
    own = tl.load(own_ptr + row, mask=row < row_end, other=0)
    # "not smaller", so that NaN counts against the row, like a tie
    beats = kept & (positive == 0) & ((s < own[:, None]) == 0)
    rank = tl.sum(beats.to(tl.int32), 1)
    tl.store(rank_ptr + part * rows + row - row0, rank, mask=row < row_end)
    if COLUMNS:
        columns = col_end - col0
        out = col_sums_ptr + tl.cast(row_tile, tl.int64) * STATS * columns
        store_sums(
            s, positive, kept, col_neg, col_pos, out,
            col - col0, columns, col < col_end, 0, GROUPS, SMOOTH,
        )  # fmt: skip


@triton.jit(do_not_specialize=["row0", "row_end", "col0", "col_end", "M", "N"])
def info_nce_kernel(
    q_ptr,  # [M, D]
    k_ptr,  # [N, D]
    scale_ptr,  # []
    q_norm_ptr,  # [M]
    k_norm_ptr,  # [N]
    row_ids_ptr,  # [4, M]
    col_ids_ptr,  # [4, N]
    own_ptr,  # [M]
    row_sums_ptr,
    col_sums_ptr,
    rank_ptr,
    row0,
    row_end,
    col0,
    col_end,
    M,
    N,
    D,
    stride_q,
    stride_k,
    COSINE: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    OWN: tl.constexpr,
    TEXTS: tl.constexpr,
    ANCHORS: tl.constexpr,
    DOMAINS: tl.constexpr,
    GROUPS: tl.constexpr,
    SMOOTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    STATS: tl.constexpr,
    MATH: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of BM rows by BN columns."""
    row_tile, col_tile = swizzle(
        tl.program_id(0), tl.cdiv(row_end - row0, BM), tl.cdiv(col_end - col0, BN), GROUP
    )
    row = row0 + row_tile * BM + tl.arange(0, BM)
    col = col0 + col_tile * BN + tl.arange(0, BN)
    acc = product(
        q_ptr, k_ptr, row, col, row_end, col_end, D, stride_q, stride_k,
        EVEN_D, PRECISION, ACC, BK,
    )  # fmt: skip
    WIDTH: tl.constexpr = BN // PARTS
    for part in tl.static_range(PARTS):
        col_part = col_tile * PARTS + part
        reduce_tile(
            columns_of(acc, part, PARTS),
            scale_ptr, q_norm_ptr, k_norm_ptr, row_ids_ptr, col_ids_ptr, own_ptr,
            row_sums_ptr, col_sums_ptr, rank_ptr,
            row, col0 + col_part * WIDTH + tl.arange(0, WIDTH), row_tile, col_part,
            row0, row_end, col0, col_end, M, N,
            COSINE, OWN, TEXTS, ANCHORS, DOMAINS, GROUPS, SMOOTH, COLUMNS, STATS, MATH,
        )  # fmt: skip


def own_logits(
    rows: Side,
    pairs: Side,
    scale: Tensor,
    masks: Masks,
    *,
    smooth: bool,
    config: Config | None = None,
) -> Tensor:
    """[M] the logit of each row with its own positive, in base 2.

    Args:
        rows, pairs: M embeddings each.
        scale: [] in the accumulator's dtype.
        masks, smooth, config: those of the sums that the logits are compared with.
    """
    config, size = config or config_of(rows.x, masks, smooth), len(rows.x)
    out = rows.x.new_empty(size, dtype=accumulator(rows.x.dtype))
    own_logits_kernel[(triton.cdiv(size, config.block_m),)](
        *operands(rows, pairs, scale),
        out,
        size,
        rows.x.shape[1],
        rows.x.stride(0),
        pairs.x.stride(0),
        **product_meta(rows, config),
        PARTS=parts_of(config, rows.x, masks),
        **config.meta(),
    )
    return out


def info_nce_sums(
    rows: Side,
    columns: Side,
    scale: Tensor,
    own: Tensor,
    area: Area,
    masks: Masks,
    *,
    smooth: bool,
    want_columns: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The sums of every tile of a rectangle of logits.

    Args:
        rows, columns: M and N embeddings of one dtype; equal texts have equal ids in both.
        scale: [] in the accumulator's dtype.
        own: [M], of :func:`own_logits`.
        smooth: whether to compute ALL_SUM and ALL_COUNT.
        want_columns: whether to compute the sums of columns.
        config: tile sizes; ``None``: the heuristic's.

    Returns:
        [column parts, statistics, rows], [row tiles, statistics, columns] or ``None``, and the
        ranks less 1 [column parts, rows] int32. There are ``STATISTICS`` statistics, of which
        those not asked for are not written, or NEG alone.
    """
    config = config or config_of(rows.x, masks, smooth)
    parts, (height, width) = parts_of(config, rows.x, masks), area.shape
    row_tiles, col_tiles = triton.cdiv(height, config.block_m), triton.cdiv(width, config.block_n)
    stats = STATISTICS if masks.groups or smooth else 1
    like = rows.x.new_empty(0, dtype=accumulator(rows.x.dtype))
    row_sums = like.new_empty(col_tiles * parts, stats, height)
    col_sums = like.new_empty(row_tiles, stats, width) if want_columns else None
    rank = row_sums.new_empty(col_tiles * parts, height, dtype=torch.int32)
    info_nce_kernel[(row_tiles * col_tiles,)](
        *operands(rows, columns, scale),
        rows.ids,
        columns.ids,
        own,
        row_sums,
        col_sums,
        rank,
        *area,
        *sizes(rows, columns),
        **product_meta(rows, config),
        **masks.meta(),
        SMOOTH=smooth,
        COLUMNS=want_columns,
        STATS=stats,
        MATH=exp2_of(rows.x),
        PARTS=parts,
        **config.meta(),
    )
    return row_sums, col_sums, rank
