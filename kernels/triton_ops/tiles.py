"""Which rows and which columns a program computes.

Rows are sorted by expert; those of expert e are ``offsets[e] .. offsets[e + 1]``. A tile has at
most BLOCK rows of one expert. Only the device knows the number of tiles. The size of the grid is
therefore an upper bound that follows from shapes, and programs past the last tile return. The host
never has to wait for the device.
"""

from __future__ import annotations

import triton
import triton.language as tl


def tile_bound(num_rows: int, num_experts: int, block: int) -> int:
    """The most tiles of ``block`` rows that ``num_rows`` rows of E experts can need."""
    return triton.cdiv(max(num_rows - num_experts + 1, 0), block) + num_experts - 1


@triton.jit
def find_tile(tile, offsets_ptr, E, E_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """The expert, first row and end row of a tile; the expert is >= E past the last tile."""
    expert = tl.arange(0, E_BLOCK)
    first = tl.load(offsets_ptr + expert, mask=expert < E, other=0)
    last = tl.load(offsets_ptr + expert + 1, mask=expert < E, other=0)
    count = (last - first + BLOCK - 1) // BLOCK
    ends = tl.cumsum(count, 0)
    found = tl.sum((ends <= tile).to(tl.int32), 0)
    here = expert == found
    row = tl.sum(tl.where(here, first + (tile - ends + count) * BLOCK, 0), 0)
    end = tl.sum(tl.where(here, last, 0), 0)
    return found, row, end


@triton.jit
def rows_of(first, end, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """The rows of a tile, and which of them are the expert's: all, if BLOCK divides its rows."""
    row = first + tl.arange(0, BLOCK)
    return row, tl.full((BLOCK,), True, tl.int1) if PADDED else row < end


@triton.jit
def swizzle(pid, num_m, num_n, GROUP: tl.constexpr):
    """(row tile, column tile) of a program; GROUP row tiles share cached columns."""
    per_group = GROUP * num_n
    first = (pid // per_group) * GROUP
    size = tl.minimum(num_m - first, GROUP)
    return first + (pid % per_group) % size, (pid % per_group) // size
