"""The plan with padded experts: the number of each expert's rows rounded up to a multiple of 128.

Rows that are sorted and padded once need no index and no mask in the products that read them. The
rows that pad an expert are 0 in what is multiplied, so that they add nothing to sums over rows; no
result of theirs is stored in token order. A row that pads has the token and the slot -1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import COLUMNS, ROWS, Plan, expert_block, row_major
from .tiles import find_tile

PAD_ROWS = 128


class PaddedPlan(NamedTuple):
    """Index tensors of P padded rows, int64; in order of the experts, then of the plan's rows.

    Attributes:
        expert_offsets: [E + 1], multiples of 128.
        row_to_token, row_to_slot: [P], -1 for rows that pad; the skipped slots follow the experts.
        slot_to_row: [S], -1 for skipped slots.
        tile_expert: [P / 128] int32, the expert of each 128 rows; E behind the last.
    """

    expert_offsets: Tensor
    row_to_token: Tensor
    row_to_slot: Tensor
    slot_to_row: Tensor
    tile_expert: Tensor


def padded_rows(num_rows: int, num_experts: int) -> int:
    """P, the rows that any S rows of E experts fit when they are padded: a multiple of 128."""
    # Plain arithmetic, because torch.compile traces it with symbols.
    return (num_rows + (num_experts + 1) * (PAD_ROWS - 1)) // PAD_ROWS * PAD_ROWS


def divides(block: int) -> bool:
    """Whether tiles of ``block`` rows never reach past the padded rows of their expert."""
    return PAD_ROWS % block == 0


@triton.jit(do_not_specialize=["S"])
def pad_plan_kernel(
    offsets_ptr,  # [E + 1]
    row_to_token_ptr,  # [S]
    row_to_slot_ptr,  # [S]
    padded_offsets_ptr,  # [E + 1]
    padded_token_ptr,  # [P]
    padded_slot_ptr,  # [P]
    slot_to_row_ptr,  # [S], by padded rows
    tile_expert_ptr,  # [P / BLOCK]
    S,
    E,
    E_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK padded rows, all of one expert or all after the last; program 0 writes the offsets."""
    tile = tl.program_id(0)
    expert = tl.arange(0, E_BLOCK)
    first = tl.load(offsets_ptr + expert, mask=expert < E, other=0)
    last = tl.load(offsets_ptr + expert + 1, mask=expert < E, other=0)
    tiles = (last - first + BLOCK - 1) // BLOCK
    if tile == 0:
        ends = tl.cumsum(tiles, 0) * BLOCK
        tl.store(padded_offsets_ptr + expert, ends - tiles * BLOCK, mask=expert < E)
        tl.store(padded_offsets_ptr + expert + 1, ends, mask=expert == E - 1)
    found, row, end = find_tile(tile, offsets_ptr, E, E_BLOCK, BLOCK)
    tl.store(tile_expert_ptr + tile, tl.minimum(found, E).to(tl.int32))
    skipped = found >= E
    if skipped:
        row = tl.load(offsets_ptr + E) + (tile - tl.sum(tiles, 0)) * BLOCK
        end = tl.cast(S, tl.int64)
    row += tl.arange(0, BLOCK)
    at = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(row_to_token_ptr + row, mask=row < end, other=-1)
    slot = tl.load(row_to_slot_ptr + row, mask=row < end, other=-1)
    tl.store(padded_token_ptr + at, token)
    tl.store(padded_slot_ptr + at, slot)
    tl.store(slot_to_row_ptr + slot, tl.where(skipped, -1, at), mask=row < end)


def pad_plan(plan: Plan) -> PaddedPlan:
    """The same plan with padded experts; its size follows from shapes alone."""
    offsets, row_to_token, _ = plan
    num_rows, num_experts = row_to_token.shape[0], offsets.shape[0] - 1
    count = padded_rows(num_rows, num_experts)
    sizes = (num_experts + 1, count, count, num_rows)
    tiles = offsets.new_empty(count // PAD_ROWS, dtype=torch.int32)
    padded = PaddedPlan(*(offsets.new_empty(size) for size in sizes), tiles)
    pad_plan_kernel[(count // PAD_ROWS,)](
        *plan,
        *padded,
        num_rows,
        num_experts,
        E_BLOCK=expert_block(num_experts),
        BLOCK=PAD_ROWS,
    )
    return padded


@triton.jit
def sort_rows_kernel(
    x_ptr,  # [T, N]
    out_ptr,  # [P, N]
    row_to_token_ptr,  # [P]
    N,
    stride_x,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS rows by COLUMNS columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.load(row_to_token_ptr + row)
    x = x_ptr + token[:, None] * stride_x + n[None, :]
    value = tl.load(x, mask=(token >= 0)[:, None] & (n < N)[None, :], other=0)
    out = out_ptr + row[:, None] * N + n[None, :]
    tl.store(out, value, mask=(n < N)[None, :])


def sort_rows(x: Tensor, padded: PaddedPlan) -> Tensor:
    """[P, N] the rows of x [T, N] in the padded plan's order; rows that pad are 0."""
    x, (count, n) = row_major(x), (padded.row_to_token.shape[0], x.shape[1])
    out = x.new_empty(count, n)
    if out.numel():
        # ROWS divides P, like all tiles of padded rows.
        grid = (count // ROWS, triton.cdiv(n, COLUMNS))
        sort_rows_kernel[grid](
            x, out, padded.row_to_token, n, x.stride(0), ROWS=ROWS, COLUMNS=COLUMNS
        )
    return out
