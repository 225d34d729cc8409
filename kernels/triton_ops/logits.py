"""Tiles of a contrastive loss's logits, shared by its forward and its backward.

    s_ij = scale * <q_i, k_j> / (|q_i| |k_j|) / ln 2        (dot products: without the norms)

Logits are in base 2, because exp2 is the faster exponential. The unnormalised embeddings are
multiplied, and norms and scale are applied to the accumulator, so that 16-bit embeddings are not
rounded a second time. A launch computes one rectangle of all logits, rows ``row0 .. row_end`` by
columns ``col0 .. col_end``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_config
from .config import Config, heuristic
from .launch import accumulator, precision, triton_dtype
from .numerics import dot

_LOG2_E = tl.constexpr(1.4426950408889634)
# Cosines times a scale, in base 2, are at most ``largest`` apart from 0. Up to this number, that of
# a scale of 43, 2^(-2 largest) is no subnormal number, so that all exponentials can be taken
# relative to ``largest``, with one per pair for its row and its column.
NARROW = tl.constexpr(62.1)
# The logit of a masked pair: finite, so that no NaN results, and so low that its exponential is 0
# compared with any other.
MASKED = tl.constexpr(-1e30)
# Rows and columns of stored logits are multiples of this. Sizes of batches differ, and kernels are
# not compiled for each; by rounding sizes up they show that so many entries share one mask.
PAD = tl.constexpr(16)
# Rows of a side's ids.
_ANCHOR, _TEXT, _DOMAIN, _GROUP = (tl.constexpr(i) for i in range(4))


class Side(NamedTuple):
    """n embeddings on one side of the logits, and the ids that say which pairs are left out.

    Attributes:
        x: [n, d], rows contiguous.
        inverse_norm: [n] 1 / norm in the accumulator's dtype; ``None`` for dot products.
        ids: [4, n] float32, contiguous: text of the anchor, of the candidate, domain, group.
    """

    x: Tensor
    inverse_norm: Tensor | None
    ids: Tensor | None


class Masks(NamedTuple):
    """Which ids are compared, and whether pairs on the diagonal belong together.

    Attributes:
        own: column i is row i's positive (False for hard negatives).
        texts, anchors: the same text is no negative; the columns also have anchors.
        domains: negatives come from the same domain.
        groups: rows of one group are each other's positives.
    """

    own: bool
    texts: bool = False
    anchors: bool = False
    domains: bool = False
    groups: bool = False

    def meta(self) -> dict[str, bool]:
        """As constexpr arguments of a kernel."""
        return {name.upper(): value for name, value in self._asdict().items()}


class Area(NamedTuple):
    """A rectangle of the logits."""

    row0: int
    row_end: int
    col0: int
    col_end: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.row_end - self.row0, self.col_end - self.col0


def config_of(x: Tensor, masks: Masks, smooth: bool) -> Config:
    """Tile sizes for the logits of embeddings [n, d]; more masks need tiles of fewer columns."""
    target = launch_config.target_of(x.device.index)
    config = heuristic("linear", x.dtype, target, 128, x.shape[1])
    columns = 64 if target.startswith("gfx") else config.block_n
    if masks.groups or smooth or x.dtype == torch.float32:
        columns = 32
    elif masks.texts or masks.domains:
        columns = 128
    return replace(config, block_n=min(columns, config.block_n))


def parts_of(config: Config, x: Tensor, masks: Masks) -> int:
    """The number of parts of its columns in which a tile is reduced, to fit the registers."""
    narrow = (masks.texts or masks.domains) and x.dtype != torch.float32
    return max(1, config.block_n // (16 if narrow else 32))


def operands(rows: Side, columns: Side, scale: Tensor) -> tuple[Tensor | None, ...]:
    """The arguments that a kernel of two sides begins with."""
    return rows.x, columns.x, scale, rows.inverse_norm, columns.inverse_norm


def padded(size: int) -> int:
    """``size`` rounded up to a multiple of ``PAD``."""
    return triton.cdiv(size, PAD.value) * PAD.value


def sizes(rows: Side, columns: Side) -> tuple[int, ...]:
    """M, N, D and the strides of both sides' rows, as such a kernel takes them."""
    return len(rows.x), len(columns.x), rows.x.shape[1], rows.x.stride(0), columns.x.stride(0)


def product_meta(rows: Side, config: Config) -> dict[str, Any]:
    """The constexpr arguments of :func:`product` and :func:`scaled`."""
    return dict(
        COSINE=rows.inverse_norm is not None,
        EVEN_D=rows.x.shape[1] % config.block_k == 0,
        PRECISION=precision(rows.x.dtype),
        ACC=triton_dtype(accumulator(rows.x.dtype)),
    )


@triton.jit
def product(
    q_ptr,  # [M, D]
    k_ptr,  # [N, D]
    row,  # [BM]
    col,  # [BN]
    row_end,
    col_end,
    D,
    stride_q,
    stride_k,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BK: tl.constexpr,
):
    """[BM, BN] <q_i, k_j>, 0 outside of the rectangle."""
    d = tl.arange(0, BK)
    q = q_ptr + row.to(tl.int64)[:, None] * stride_q + d[None, :]
    k = k_ptr + col.to(tl.int64)[None, :] * stride_k + d[:, None]
    acc = tl.zeros((row.shape[0], col.shape[0]), ACC)
    for start in range(0, D, BK):
        q_mask, k_mask = (row < row_end)[:, None], (col < col_end)[None, :]
        if not EVEN_D:
            q_mask = q_mask & (d < D - start)[None, :]
            k_mask = k_mask & (d < D - start)[:, None]
        acc = dot(
            tl.load(q, mask=q_mask, other=0), tl.load(k, mask=k_mask, other=0), acc, PRECISION
        )
        q += BK
        k += BK
    return acc


@triton.jit
def lengths(q_norm_ptr, k_norm_ptr, row, col, row_end, col_end, ACC: tl.constexpr):
    """[BM, BN] 1 / (|q_i| |k_j|)."""
    of_row = tl.load(q_norm_ptr + row, mask=row < row_end, other=0).to(ACC)
    of_col = tl.load(k_norm_ptr + col, mask=col < col_end, other=0).to(ACC)
    return of_row[:, None] * of_col[None, :]


@triton.jit
def scaled(
    acc,  # [BM, BN] of product
    scale_ptr,  # []
    q_norm_ptr,
    k_norm_ptr,
    row,
    col,
    row_end,
    col_end,
    COSINE: tl.constexpr,
):
    """[BM, BN] s / ln 2."""
    s = acc * largest_logit(scale_ptr, acc.dtype)
    if COSINE:
        s *= lengths(q_norm_ptr, k_norm_ptr, row, col, row_end, col_end, acc.dtype)
    return s


@triton.jit
def largest_logit(scale_ptr, ACC: tl.constexpr):
    """The logit of a pair of cosine 1."""
    return tl.load(scale_ptr).to(ACC) * _LOG2_E


@triton.jit
def same_id(row_ids_ptr, col_ids_ptr, row, col, M, N, R: tl.constexpr, C: tl.constexpr):
    """[BM, BN] whether row R of the rows' ids equals row C of the columns'."""
    of_row = tl.load(row_ids_ptr + R * tl.cast(M, tl.int64) + row, mask=row < M, other=0)
    of_col = tl.load(col_ids_ptr + C * tl.cast(N, tl.int64) + col, mask=col < N, other=0)
    return of_row[:, None] == of_col[None, :]


@triton.jit
def take_part(
    row_ids_ptr,  # [4, M]
    col_ids_ptr,  # [4, N]
    row,
    col,
    row_end,
    col_end,
    M,
    N,
    OWN: tl.constexpr,
    TEXTS: tl.constexpr,
    ANCHORS: tl.constexpr,
    DOMAINS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Two masks [BM, BN]: whether j is a positive of i, and whether j is in i's softmax."""
    inside = (row < row_end)[:, None] & (col < col_end)[None, :]
    kept = inside
    if DOMAINS:
        kept = kept & same_id(row_ids_ptr, col_ids_ptr, row, col, M, N, _DOMAIN, _DOMAIN)
    if TEXTS:
        clash = same_id(row_ids_ptr, col_ids_ptr, row, col, M, N, _ANCHOR, _TEXT)
        clash = clash | same_id(row_ids_ptr, col_ids_ptr, row, col, M, N, _TEXT, _TEXT)
        if ANCHORS:
            clash = clash | same_id(row_ids_ptr, col_ids_ptr, row, col, M, N, _ANCHOR, _ANCHOR)
            clash = clash | same_id(row_ids_ptr, col_ids_ptr, row, col, M, N, _TEXT, _ANCHOR)
        kept = kept & (clash == 0)
    if GROUPS:
        positive = inside & same_id(row_ids_ptr, col_ids_ptr, row, col, M, N, _GROUP, _GROUP)
    elif OWN:
        positive = inside & (row[:, None] == col[None, :])
    else:
        positive = inside & (row[:, None] < 0)  # none
    return positive, kept | positive


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a gradient of the logits is stored in for the products of the backward.

    It is bfloat16 for bfloat16. float16 would underflow (a softmax over 65,536 candidates, times
    1 / B, is 1e-10). For float16 it is float32, multiplied as TF32, which has the same mantissa
    and a wider exponent.
    """
    return torch.float32 if dtype == torch.float16 else dtype
