"""A product added to a float32 total: ``total += a . b``; a may be transposed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_config
from .config import Config, heuristic
from .launch import precision
from .launch_config import exp2_of
from .logits import PAD, padded
from .numerics import columns_of, dot
from .tiles import swizzle


@triton.jit(do_not_specialize=["M", "K"])
def add_product_kernel(
    a_ptr,  # [M, K], both rounded up to PAD with PADDED; any strides
    b_ptr,  # [K, N]
    total_ptr,  # [M, N]
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_b,
    stride_total,
    PADDED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of BM by BN."""
    tile_m, tile_n = swizzle(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # The offset of the tile has 64 bits. Offsets within it have 32, to take one register each.
    a_ptr += tl.cast(tile_m * BM, tl.int64) * stride_am
    a = tl.arange(0, BM)[:, None] * stride_am + k[None, :] * stride_ak
    b = k[:, None] * stride_b + n[None, :]
    acc = tl.zeros((BM, BN), total_ptr.dtype.element_ty)
    rows, depth = M, K
    if PADDED:
        rows, depth = tl.cdiv(M, PAD) * PAD, tl.cdiv(K, PAD) * PAD
    for start in range(0, K, BK):
        a_mask, b_mask = (m < rows)[:, None], (n < N)[None, :]
        if not EVEN_K:
            a_mask = a_mask & (k < depth - start)[None, :]
            b_mask = b_mask & (k < K - start)[:, None]
        b_tile = tl.load(b_ptr + b, mask=b_mask, other=0)
        if b_tile.dtype != a_ptr.dtype.element_ty:
            b_tile = b_tile.to(a_ptr.dtype.element_ty)
        acc = dot(tl.load(a_ptr + a, mask=a_mask, other=0), b_tile, acc, PRECISION)
        a_ptr += BK * tl.cast(stride_ak, tl.int64)
        b_ptr += BK * tl.cast(stride_b, tl.int64)
    WIDTH: tl.constexpr = BN // PARTS
    row = total_ptr + m.to(tl.int64)[:, None] * stride_total
    for part in tl.static_range(PARTS):
        column = tile_n * BN + part * WIDTH + tl.arange(0, WIDTH)
        total = row + column[None, :]
        mask = (m < M)[:, None] & (column < N)[None, :]
        old = tl.load(total, mask=mask, other=0)
        tl.store(total, old + columns_of(acc, part, PARTS), mask=mask)


def _precision_of(a: Tensor, b: Tensor) -> str:
    """How the operands are multiplied."""
    allowed = precision(a.dtype)
    if allowed == "ieee" and a.dtype == torch.float32 and b.dtype == torch.float16:
        # Three products of TF32 are nearly as accurate as IEEE's, and use the tensor cores.
        return "tf32x3" if exp2_of(a) == "approximate" else "ieee"
    return allowed


def add_product(total: Tensor, a: Tensor, b: Tensor, config: Config | None = None) -> None:
    """Adds ``a . b`` to ``total`` in place.

    Args:
        total: [M, N] in the dtype to sum in, rows contiguous.
        a: [M, K], any strides; or both sizes rounded up by :func:`.logits.padded`, where all
            that pads it is finite.
        b: [K, N], rows contiguous, in a's dtype; or float16 with a float32 ``a``: TF32 represents
            float16 exactly, and ``a`` is rounded to it only if users allow that.
        config: tile sizes; ``None``: the heuristic's.
    """
    m, (k, n) = total.shape[0], b.shape
    config = config or heuristic("linear", a.dtype, launch_config.target_of(a.device.index), n, 128)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    add_product_kernel[(tiles,)](
        a,
        b,
        total,
        m,
        n,
        k,
        *a.stride(),
        b.stride(0),
        total.stride(0),
        PADDED=a.shape == (padded(m), padded(k)),
        EVEN_K=k % config.block_k == 0,
        PARTS=max(1, config.block_n // 64),
        PRECISION=_precision_of(a, b),
        **config.meta(),
    )
