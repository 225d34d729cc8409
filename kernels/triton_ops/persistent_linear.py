"""The grouped product of ``linear.py`` by programs that stay, for rows that are sorted and padded.

There is one program per multiprocessor. It computes one tile after the other, and its warps have
different tasks: one lets the TMA unit copy the tiles of operands, the others multiply these and
store the results. So the next tile's operands are on their way while a tile is finished.

Descriptors are made in the kernel and have two dimensions, because the compiler specialises no
warps for others. Stacked weights [E, N, K] are therefore one matrix [E N, K]. A tile may reach into
the next expert's weights; those columns are not stored.
"""

from __future__ import annotations

import contextvars
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_config
from .config import Config
from .descriptors import is_transposed
from .launch import accumulator, aligned, precision, triton_dtype
from .numerics import cast, dot
from .padded_plan import PAD_ROWS, PaddedPlan
from .tiles import swizzle


@triton.jit(do_not_specialize=["P"])
def persistent_linear_kernel(
    a_ptr,  # [P, K]
    w_ptr,  # [E, N, K], transposed [E, K, N]
    bias_ptr,  # [E, N]
    row_weight_ptr,  # [S] by slot
    out_ptr,  # [P, N], by token [T, N]
    offsets_ptr,  # [E + 1]
    row_to_token_ptr,  # [P]
    row_to_slot_ptr,  # [P]
    tile_expert_ptr,  # [P / PAD_ROWS]
    P,
    E,
    N,
    K,
    SCATTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PAD_ROWS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Every PROGRAMS-th tile of BM rows by BN columns; K is a multiple of BK."""
    a = tl.make_tensor_descriptor(a_ptr, [P, K], [K, 1], [BM, BK])
    if TRANSPOSED:
        w = tl.make_tensor_descriptor(w_ptr, [E * K, N], [N, 1], [BK, BN])
    else:
        w = tl.make_tensor_descriptor(w_ptr, [E * N, K], [K, 1], [BN, BK])
    row_tiles = (tl.load(offsets_ptr + E) // BM).to(tl.int32)
    column_tiles = tl.cdiv(N, BN)
    for at in tl.range(
        tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=False, warp_specialize=True
    ):
        tile, column = swizzle(at, row_tiles, column_tiles, GROUP)
        expert = tl.load(tile_expert_ptr + tile * BM // PAD_ROWS)
        acc = tl.zeros((BM, BN), ACC)
        for start in range(0, K, BK):
            a_tile = a.load([tile * BM, start])
            if TRANSPOSED:
                w_tile = w.load([expert * K + start, column * BN])
            else:
                w_tile = w.load([expert * N + column * BN, start]).trans()
            acc = dot(a_tile, w_tile, acc, PRECISION)
        n = column * BN + tl.arange(0, BN)
        # In one piece: Triton 3.6 cannot divide a tile among warps and then into its columns.
        if HAS_BIAS:
            bias = bias_ptr + expert.to(tl.int64) * N + n
            acc += tl.load(bias, mask=n < N, other=0).to(ACC)[None, :]
        row = tile.to(tl.int64) * BM + tl.arange(0, BM)
        if WEIGHTED:
            slot = tl.load(row_to_slot_ptr + row)
            acc *= tl.load(row_weight_ptr + slot, mask=slot >= 0, other=0).to(ACC)[:, None]
        target = row
        if SCATTER:
            target = tl.load(row_to_token_ptr + row)
        out = out_ptr + target[:, None] * N + n[None, :]
        mask = (target >= 0)[:, None] & (n < N)[None, :]
        tl.store(out, cast(acc, out_ptr.dtype.element_ty), mask=mask)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that the kernel makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def persistent_linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weights: Tensor | None,
    padded: PaddedPlan,
    out: Tensor,
    config: Config,
    *,
    scatter: bool,
) -> None:
    """Write the product to ``out``: [P, N], with ``scatter`` [T, N] by token.

    Args:
        a: [P, K], contiguous.
        weight: [E, N, K]; K and N such that rows are multiples of 16 bytes, and K of block_k.
        bias, row_weights: as in :func:`.linear.linear`.
    """
    num_experts, n, k = weight.shape
    transposed = is_transposed(weight)
    programs = launch_config.multiprocessors(a.device.index)
    launch = functools.partial(
        persistent_linear_kernel[(programs,)],
        aligned(a),
        aligned(weight.mT if transposed else weight).contiguous(),
        bias,
        row_weights,
        out,
        padded.expert_offsets,
        padded.row_to_token,
        padded.row_to_slot,
        padded.tile_expert,
        a.shape[0],
        num_experts,
        n,
        k,
        SCATTER=scatter,
        HAS_BIAS=bias is not None,
        WEIGHTED=row_weights is not None,
        TRANSPOSED=transposed,
        PRECISION=precision(a.dtype),
        ACC=triton_dtype(accumulator(a.dtype)),
        PROGRAMS=programs,
        PAD_ROWS=PAD_ROWS,
        **config.meta(),
    )

    def with_scratch() -> None:
        triton.set_allocator(_scratch)
        launch()

    contextvars.copy_context().run(with_scratch)  # the caller's allocator stays as it is
