"""The gradient of the contrastive loss with respect to a rectangle of its products <q_i, k_j>.

    G_ij = w_i (exp(s_ij - lse_i) - T_ij) + w_j (exp(s_ij - lse_j) - T'_ij)
    H_ij = G_ij / (|q_i| |k_j|)         (dot products: G_ij)

The logits are computed again. The gradients of the two sides are the products ``H k`` and ``H^T
q``, up to a factor per row. H is stored for one rectangle at a time, not for B x N. The gradient of
the scale is the sum of ``G s``, which is computed before H is rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .config import Config
from .launch import accumulator
from .launch_config import exp2_of
from .logits import (
    NARROW,
    PAD,
    Area,
    Masks,
    Side,
    config_of,
    largest_logit,
    lengths,
    operands,
    parts_of,
    product,
    product_meta,
    scaled,
    sizes,
    take_part,
)
from .numerics import cast, columns_of, exp2
from .tiles import swizzle

# The terms of each row, or column, in the gradient, [5, n]; see ``info_nce_grad``.
_LOG_TOTAL, _POSITIVE, _EVERY, _OWN, _ALONE = (tl.constexpr(i) for i in range(5))


@triton.jit
def load_term(terms_ptr, TERM: tl.constexpr, at, count):
    """[block] one of the terms, 0 for indices past the end."""
    return tl.load(terms_ptr + TERM * tl.cast(count, tl.int64) + at, mask=at < count, other=0)


@triton.jit
def target(row_terms_ptr, col_terms_ptr, TERM: tl.constexpr, row, col, M, N, COLUMNS: tl.constexpr):
    """[BM, 1], or [BM, BN] with columns: a term of the rows plus that of the columns."""
    total = load_term(row_terms_ptr, TERM, row, M)[:, None]
    if COLUMNS:
        total = total + load_term(col_terms_ptr, TERM, col, N)[None, :]
    return total


@triton.jit
def gradient(
    s,
    positive,
    kept,
    row_terms_ptr,
    col_terms_ptr,
    row,
    col,
    M,
    N,
    largest,
    COSINE: tl.constexpr,
    OWN: tl.constexpr,
    GROUPS: tl.constexpr,
    SMOOTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    MATH: tl.constexpr,
):
    """[BM, BN] G."""
    of_row = load_term(row_terms_ptr, _LOG_TOTAL, row, M)[:, None]
    if COLUMNS:
        of_col = load_term(col_terms_ptr, _LOG_TOTAL, col, N)[None, :]
        if COSINE:
            # At most 1 times at most 2^(2 largest): a row's own pair is in its sum.
            if largest <= NARROW:
                shares = exp2(largest - of_row, MATH) + exp2(largest - of_col, MATH)
                grad = exp2(s - largest, MATH) * shares
            else:
                grad = exp2(s - of_row, MATH) + exp2(s - of_col, MATH)
        else:
            grad = exp2(s - of_row, MATH) + exp2(s - of_col, MATH)
    else:
        grad = exp2(s - of_row, MATH)
    if SMOOTH:
        grad -= target(row_terms_ptr, col_terms_ptr, _EVERY, row, col, M, N, COLUMNS)
    grad = tl.where(kept, grad, 0.0)
    if OWN or GROUPS:
        share = target(row_terms_ptr, col_terms_ptr, _POSITIVE, row, col, M, N, COLUMNS)
        grad = tl.where(positive, grad - share, grad)
    if OWN and not SMOOTH:
        # Where the gradient is tiny, the difference above would be mostly rounding error.
        alone = load_term(row_terms_ptr, _ALONE, row, M)[:, None] != 0
        exact = target(row_terms_ptr, col_terms_ptr, _OWN, row, col, M, N, COLUMNS)
        grad = tl.where(positive & alone, exact, grad)
    return grad


@triton.jit
def store_gradient(
    acc,
    scale_ptr,
    q_norm_ptr,
    k_norm_ptr,
    row_ids_ptr,
    col_ids_ptr,
    row_terms_ptr,
    col_terms_ptr,
    out_ptr,
    total_ptr,  # [column parts, rows]
    stride_out,
    row,
    col,
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
    MATH: tl.constexpr,
):
    """Writes H of a tile, or of a part of its columns, and the sum of G s of every row.

    H is 0 in the rows and columns that pad the rectangle.
    """
    height = tl.cdiv(row_end - row0, PAD) * PAD
    width = tl.cdiv(col_end - col0, PAD) * PAD
    at_col = col_part * col.shape[0] + tl.arange(0, col.shape[0])
    s = scaled(acc, scale_ptr, q_norm_ptr, k_norm_ptr, row, col, row_end, col_end, COSINE)
    positive, kept = take_part(
        row_ids_ptr, col_ids_ptr, row, col, row_end, col_end, M, N,
        OWN, TEXTS, ANCHORS, DOMAINS, GROUPS,
    )  # fmt: skip
    grad = gradient(
        s, positive, kept, row_terms_ptr, col_terms_ptr, row, col, M, N,
        largest_logit(scale_ptr, s.dtype), COSINE, OWN, GROUPS, SMOOTH, COLUMNS, MATH,
    )  # fmt: skip
    at = tl.cast(col_part, tl.int64) * (row_end - row0) + row - row0
    tl.store(total_ptr + at, tl.sum(grad * s, 1), mask=row < row_end)
    if COSINE:
        grad *= lengths(q_norm_ptr, k_norm_ptr, row, col, row_end, col_end, acc.dtype)
    out = out_ptr + (row - row0).to(tl.int64)[:, None] * stride_out + at_col[None, :]
    inside = (row - row0 < height)[:, None] & (at_col < width)[None, :]
    tl.store(out, cast(grad, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["row0", "row_end", "col0", "col_end", "M", "N"])
def info_nce_grad_kernel(
    q_ptr,  # [M, D]
    k_ptr,  # [N, D]
    scale_ptr,  # []
    q_norm_ptr,  # [M]
    k_norm_ptr,  # [N]
    row_ids_ptr,  # [4, M]
    col_ids_ptr,  # [4, N]
    row_terms_ptr,  # [5, M]
    col_terms_ptr,  # [5, N]
    out_ptr,  # [rows, columns] of the rectangle
    total_ptr,  # [column parts, rows]
    row0,
    row_end,
    col0,
    col_end,
    M,
    N,
    D,
    stride_q,
    stride_k,
    stride_out,
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
        store_gradient(
            columns_of(acc, part, PARTS),
            scale_ptr, q_norm_ptr, k_norm_ptr, row_ids_ptr, col_ids_ptr,
            row_terms_ptr, col_terms_ptr, out_ptr, total_ptr, stride_out,
            row, col0 + col_part * WIDTH + tl.arange(0, WIDTH), col_part,
            row0, row_end, col0, col_end, M, N,
            COSINE, OWN, TEXTS, ANCHORS, DOMAINS, GROUPS, SMOOTH, COLUMNS, MATH,
        )  # fmt: skip


def info_nce_grad(
    rows: Side,
    columns: Side,
    scale: Tensor,
    row_terms: Tensor,
    col_terms: Tensor | None,
    area: Area,
    masks: Masks,
    out: Tensor,
    *,
    smooth: bool,
    config: Config | None = None,
) -> Tensor:
    """Writes H of a rectangle, and zeros that pad it, to the top left of ``out``.

    Args:
        rows, columns: M and N embeddings of one dtype; equal texts have equal ids in both.
        scale: [] in the accumulator's dtype.
        row_terms, col_terms: [5, M] and [5, N]: ``lse - log w`` in base 2; the weighted target of
            a positive; the same of every candidate, for label smoothing; the gradient of a
            row's only positive; whether there is only one positive. ``None`` for columns
            without a loss.
        out: rows contiguous, in the dtype of the products that read it; at least as large as the
            rectangle with each size rounded up by :func:`.logits.padded`.
        config: tile sizes; ``None``: the heuristic's.

    Returns:
        [column parts, rows] the sums of G s in base 2.
    """
    config = config or config_of(rows.x, masks, smooth)
    parts, (height, width) = parts_of(config, rows.x, masks), area.shape
    row_tiles, col_tiles = triton.cdiv(height, config.block_m), triton.cdiv(width, config.block_n)
    total = rows.x.new_empty(col_tiles * parts, height, dtype=accumulator(rows.x.dtype))
    info_nce_grad_kernel[(row_tiles * col_tiles,)](
        *operands(rows, columns, scale),
        rows.ids,
        columns.ids,
        row_terms,
        col_terms,
        out,
        total,
        *area,
        *sizes(rows, columns),
        out.stride(0),
        **product_meta(rows, config),
        **masks.meta(),
        SMOOTH=smooth,
        COLUMNS=col_terms is not None,
        MATH=exp2_of(rows.x),
        PARTS=parts,
        **config.meta(),
    )
    return total
