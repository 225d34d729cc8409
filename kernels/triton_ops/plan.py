"""Counting sort of slots by expert id: stable, without synchronisation and atomics.

1. each block of slots counts its experts                          counts [blocks, E + 1]
2. one program turns the counts into first rows, expert by expert  bases [blocks, E + 1], offsets
3. each block ranks its slots and writes the permutation both ways

Slots with ids outside [0, E) form the last group, the skipped slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Entries of a block's one-hot table, and the blocks that step 2 processes at a time.
_TABLE, _CHUNK = 8192, 64


@triton.jit
def _one_hot(ids_ptr, S, E, E_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """The slots of this program, their expert (E = skipped) and the table [BLOCK, E_BLOCK]."""
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids_ptr + slot, mask=slot < S, other=0).to(tl.int64)
    expert = tl.where((expert < 0) | (expert > E), E, expert).to(tl.int32)
    table = (expert[:, None] == tl.arange(0, E_BLOCK)[None, :]) & (slot < S)[:, None]
    return slot, expert, table.to(tl.int32)


@triton.jit(do_not_specialize=["S"])
def count_kernel(ids_ptr, counts_ptr, S, E, E_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """Step 1."""
    _, _, table = _one_hot(ids_ptr, S, E, E_BLOCK, BLOCK)
    column = tl.arange(0, E_BLOCK)
    counts = counts_ptr + tl.program_id(0).to(tl.int64) * (E + 1) + column
    tl.store(counts, tl.sum(table, 0).to(tl.int64), mask=column <= E)


@triton.jit(do_not_specialize=["blocks"])
def base_kernel(
    counts_ptr,  # [blocks, E + 1], overwritten by the bases
    offsets_ptr,  # [E + 1]
    blocks,
    E,
    E_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Step 2."""
    column = tl.arange(0, E_BLOCK)
    total = tl.zeros((E_BLOCK,), tl.int64)
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        at = counts_ptr + block.to(tl.int64)[:, None] * (E + 1) + column[None, :]
        mask = (block < blocks)[:, None] & (column <= E)[None, :]
        total += tl.sum(tl.load(at, mask=mask, other=0), 0)
    base = tl.cumsum(total, 0) - total
    tl.store(offsets_ptr + column, base, mask=column <= E)
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        at = counts_ptr + block.to(tl.int64)[:, None] * (E + 1) + column[None, :]
        mask = (block < blocks)[:, None] & (column <= E)[None, :]
        counts = tl.load(at, mask=mask, other=0)
        tl.store(at, base[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        base += tl.sum(counts, 0)


@triton.jit(do_not_specialize=["S"])
def scatter_kernel(
    ids_ptr,
    bases_ptr,  # [blocks, E + 1]
    row_to_token_ptr,
    row_to_slot_ptr,
    slot_to_row_ptr,
    S,
    K,
    E,
    E_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step 3."""
    slot, expert, table = _one_hot(ids_ptr, S, E, E_BLOCK, BLOCK)
    rank = tl.sum(table * (tl.cumsum(table, 0) - 1), 1)
    base = bases_ptr + tl.program_id(0).to(tl.int64) * (E + 1) + expert
    row = tl.load(base, mask=slot < S, other=0) + rank
    tl.store(row_to_slot_ptr + row, slot, mask=slot < S)
    tl.store(row_to_token_ptr + row, slot // K, mask=slot < S)
    tl.store(slot_to_row_ptr + slot, tl.where(expert < E, row, -1), mask=slot < S)


def plan(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns offsets [E + 1], row to token, row to slot and slot to row, each [S]; all int64.

    Args:
        top_k_index: [T, K] int64 or int32; ids outside [0, E) are skipped.
    """
    num_slots, k = top_k_index.numel(), top_k_index.shape[1]
    # The last used column of the table is E, that of the skipped slots.
    e_block = triton.next_power_of_2(num_experts + 1)
    block = max(16, min(1024, _TABLE // e_block))
    blocks = triton.cdiv(num_slots, block)

    def new(*shape: int) -> Tensor:
        return top_k_index.new_empty(shape, dtype=torch.int64)

    counts, offsets = new(blocks, num_experts + 1), new(num_experts + 1)
    row_to_token, row_to_slot, slot_to_row = new(num_slots), new(num_slots), new(num_slots)
    ids = top_k_index.contiguous()
    sizes = dict(E_BLOCK=e_block, BLOCK=block)
    if num_slots:
        count_kernel[(blocks,)](ids, counts, num_slots, num_experts, **sizes)
    chunk = max(1, min(_CHUNK, _TABLE // e_block))
    base_kernel[(1,)](counts, offsets, blocks, num_experts, E_BLOCK=e_block, CHUNK=chunk)
    if num_slots:
        scatter_kernel[(blocks,)](
            ids,
            counts,
            row_to_token,
            row_to_slot,
            slot_to_row,
            num_slots,
            k,
            num_experts,
            **sizes,
        )
    return offsets, row_to_token, row_to_slot, slot_to_row
