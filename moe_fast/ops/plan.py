"""plan: the order in which experts see their rows, from the ids that ``route`` chose.

Every (token, slot) pair whose id is below E is a row. Rows are sorted by expert, stably: within
an expert they keep the order of their flat slot ``t * K + k``. A :class:`RoutingPlan` holds that
permutation in both directions, so that compute can walk an expert's rows contiguously and results
can be gathered back per token without atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_fast.ops import backends, native
from moe_fast.ops.checks import INTEGER_DTYPES, check_count, check_dtype, checks_values
from moe_fast.ops.shortcut import register_op


@dataclass(frozen=True)
class RoutingPlan:
    """Index tensors that tie routing to compute; all int64, S = T * K.

    Attributes:
        expert_offsets: [E + 1]; the rows of expert e are ``offsets[e] .. offsets[e + 1]``.
        row_to_token: [S]; the token of each row.
        row_to_slot: [S]; the flat slot ``t * K + k`` of each row.
        slot_to_row: [S]; the row of each flat slot, -1 where the slot is skipped.
        tiles: for each block size asked for, [n, 2] pairs (first row, expert) that cover every
            expert's rows in steps of the block size, padded with -1 to the bound
            ``n = ceil(max(S - E + 1, 0) / block) + E - 1`` that depends on shapes alone.

    Only the first ``expert_offsets[E]`` rows are valid; the rows behind them are the skipped
    slots, in slot order, and nothing may be computed from them.

    Example: 6 tokens, 3 experts, K = 2; token 5 is padding (id 3 = E, "skip")::

        top_k_index = [[0, 2], [2, 0], [1, 0], [2, 1], [2, 0], [3, 3]]
        flat slot       0  1    2  3    4  5    6  7    8  9   10 11

        expert_offsets = [0, 4, 6, 10]
                          expert 0    | expert 1 | expert 2   | skipped
        row_to_slot    = [0, 3, 5, 9,   4, 7,      1, 2, 6, 8,  10, 11]
        row_to_token   = [0, 1, 2, 4,   2, 3,      0, 1, 3, 4,   5,  5]
        slot_to_row    = [0, 6, 7, 1, 4, 2, 8, 5, 9, 3, -1, -1]
        tiles[3]       = [[0, 0], [3, 0], [4, 1], [6, 2], [9, 2], [-1, -1]]
    """

    expert_offsets: Tensor
    row_to_token: Tensor
    row_to_slot: Tensor
    slot_to_row: Tensor
    tiles: dict[int, Tensor] = field(default_factory=dict)


_MOST_EXPERTS = 2**24  # a slip beyond it would ask for terabytes


def plan(
    top_k_index: Tensor,
    num_experts: int,
    *,
    block_sizes: Sequence[int] = (),
    backend: str | None = None,
) -> RoutingPlan:
    """Sort the (token, slot) pairs by expert.

    Args:
        top_k_index: [T, K] int64 or int32; ids >= E are skipped.
        num_experts: E.
        block_sizes: row counts to make a tile schedule for, each > 0.
        backend: see :func:`moe_fast.use_backend`.

    Raises:
        ValueError, TypeError: for shapes and dtypes that do not fit; on the CPU (elsewhere with
            ``MOE_FAST_CHECK=1``) also for negative ids.
    """
    check_dtype("top_k_index", top_k_index, INTEGER_DTYPES)
    if top_k_index.dim() != 2 or top_k_index.shape[1] < 1:
        raise ValueError(f"top_k_index must be [T, K], K >= 1; got {list(top_k_index.shape)}.")
    check_count("num_experts", num_experts)
    if num_experts > _MOST_EXPERTS:
        raise ValueError(f"num_experts must be at most {_MOST_EXPERTS}; got {num_experts}.")
    for size in block_sizes:
        check_count("block_sizes", size)
    run = backends.select("plan", backend, top_k_index.device)
    offsets, row_to_token, row_to_slot, slot_to_row = run(top_k_index, num_experts)
    tiles = {b: _tile_schedule(offsets, row_to_slot.shape[0], b) for b in block_sizes}
    return RoutingPlan(offsets, row_to_token, row_to_slot, slot_to_row, tiles)


def _tile_schedule(expert_offsets: Tensor, num_rows: int, block_size: int) -> Tensor:
    """[n, 2] pairs (first row, expert); see :class:`RoutingPlan`. No synchronisation."""
    num_experts = expert_offsets.shape[0] - 1
    bound = (max(num_rows - num_experts + 1, 0) + block_size - 1) // block_size + num_experts - 1
    tiles_of_expert = (expert_offsets.diff() + block_size - 1) // block_size
    ends = tiles_of_expert.cumsum(0)
    tile = torch.arange(bound, device=expert_offsets.device)
    expert = torch.searchsorted(ends, tile, right=True)
    safe = expert.clamp(max=num_experts - 1)
    first = expert_offsets[safe] + (tile - ends[safe] + tiles_of_expert[safe]) * block_size
    schedule = torch.stack((first, expert), dim=1)
    return torch.where((expert < num_experts)[:, None], schedule, -1)


def check_not_negative(top_k_index: Tensor) -> None:
    """Raise ``ValueError`` for negative ids, where values are checked."""
    if checks_values(top_k_index.device) and (top_k_index < 0).any():
        raise ValueError(f"top_k_index must not be negative; got {int(top_k_index.min())}.")


@torch.library.custom_op("moe_fast::plan", mutates_args=())
def _plan_op(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flat = top_k_index.reshape(-1).to(torch.int64)
    check_not_negative(flat)
    # Negative ids, unchecked on a GPU, are skipped too: never out of bounds in memory.
    expert = torch.where((flat < 0) | (flat > num_experts), num_experts, flat)
    row_to_slot = torch.argsort(expert, stable=True)
    counts = torch.bincount(expert, minlength=num_experts + 1)
    expert_offsets = torch.cat((counts.new_zeros(1), counts[:num_experts].cumsum(0)))
    rows = torch.arange(flat.shape[0], device=flat.device)
    slot_to_row = torch.empty_like(rows).scatter_(0, row_to_slot, rows)
    slot_to_row = torch.where(expert < num_experts, slot_to_row, -1)
    return expert_offsets, row_to_slot // top_k_index.shape[1], row_to_slot, slot_to_row


def _plan_cpp(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kernels/csrc/cpu/plan.cpp, kernels/csrc/cuda/plan.cu: a parallel counting sort."""
    if top_k_index.device.type != "cpu":  # on the CPU the sort itself finds negative ids
        check_not_negative(top_k_index)
    return native.call(torch.ops.moe_fast_cpp.plan, top_k_index, num_experts)


@_plan_op.register_fake
def fake(top_k_index, num_experts):
    """Shapes of the op's results, on every backend."""

    def empty(size):
        return top_k_index.new_empty((size,), dtype=torch.int64)

    rows = top_k_index.shape[0] * top_k_index.shape[1]
    return empty(num_experts + 1), empty(rows), empty(rows), empty(rows)


backends.register("plan", "torch", _plan_op)
backends.register(
    "plan", "cpp", register_op("moe_fast::plan_cpp", _plan_cpp, fake), native.why_unavailable
)
