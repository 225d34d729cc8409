"""plan: sorts rows by expert, from the expert ids that ``route`` chose.

T tokens have K slots each; there are E experts. Every (token, slot) pair with an id below E is a
row. Rows are sorted by expert, stably: within an expert they keep the order of their flat slot
``t * K + k``. A :class:`RoutingPlan` holds this permutation in both directions, so that kernels can
read an expert's rows contiguously, and results can be gathered per token without atomics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.checked_calls import once_per_signature
from moe_fast.ops.checks import INTEGER_DTYPES, check_count, check_dtype
from moe_fast.ops.plan import cpp, reference, triton  # noqa: F401 - each registers itself


@dataclass(frozen=True)
class RoutingPlan:
    """Index tensors between tokens and the rows of experts; all are int64, S = T * K.

    Attributes:
        expert_offsets: [E + 1]; the rows of expert e are ``offsets[e] .. offsets[e + 1]``.
        row_to_token: [S]; the token of each row.
        row_to_slot: [S]; the flat slot ``t * K + k`` of each row.
        slot_to_row: [S]; the row of each flat slot, -1 if the slot is skipped.
        tiles: a tensor [n, 2] for each block size that was asked for, {block size: tensor}. Its
            pairs (first row, expert) cover every expert's rows in steps of the block size. It is
            padded with -1 to ``n = ceil(max(S - E + 1, 0) / block) + E - 1``, which depends on
            shapes only.
        indices: the four index tensors, in the order in which the registered ops take them.
        layout: what determines the shapes, dtypes and device of a plan of :func:`plan`; ``None``
            for any other plan, such as a changed one. Ops recognise the plan by it.

    Only the first ``expert_offsets[E]`` rows are valid. The rows behind them are the skipped slots,
    in slot order; they must not be used.

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
    indices: tuple[Tensor, Tensor, Tensor, Tensor] = field(init=False, repr=False, compare=False)
    layout: tuple | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # An attribute, not a property, because every layer reads it twice per call.
        indices = (self.expert_offsets, self.row_to_token, self.row_to_slot, self.slot_to_row)
        object.__setattr__(self, "indices", indices)


_MOST_EXPERTS = 2**24  # more are a mistake, and would take terabytes


def plan(
    top_k_index: Tensor,
    num_experts: int,
    *,
    block_sizes: Sequence[int] = (),
    backend: str | None = None,
) -> RoutingPlan:
    """Sort the (token, slot) pairs by expert.

    Args:
        top_k_index: [T, K] int64 or int32; slots with ids >= E are skipped.
        num_experts: E.
        block_sizes: numbers of rows, each > 0, to make ``RoutingPlan.tiles`` for.
        backend: see :func:`moe_fast.use_backend`.

    Returns:
        The :class:`RoutingPlan`.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit; on the CPU (elsewhere with
            ``MOE_FAST_CHECK=1``) also for negative ids.
    """
    for size in block_sizes:
        check_count("block_sizes", size)
    run, layout = _prepare(top_k_index, num_experts, backend)
    offsets, row_to_token, row_to_slot, slot_to_row = run(top_k_index, num_experts)
    tiles = {b: _tile_schedule(offsets, row_to_slot.shape[0], b) for b in block_sizes}
    made = RoutingPlan(offsets, row_to_token, row_to_slot, slot_to_row, tiles)
    if layout is not None:
        object.__setattr__(made, "layout", layout)
    return made


@once_per_signature
def _prepare(
    top_k_index: Tensor, num_experts: int, backend: str | None
) -> tuple[Callable, tuple | None]:
    """Check the arguments; return the implementation to run, and the layout of its plan."""
    check_dtype("top_k_index", top_k_index, INTEGER_DTYPES)
    if top_k_index.dim() != 2 or top_k_index.shape[1] < 1:
        raise ValueError(f"top_k_index must be [T, K], K >= 1; got {list(top_k_index.shape)}.")
    check_count("num_experts", num_experts)
    if num_experts > _MOST_EXPERTS:
        raise ValueError(f"num_experts must be at most {_MOST_EXPERTS}; got {num_experts}.")
    run = backends.select("plan", backend, top_k_index.device)
    if torch.compiler.is_compiling():  # sizes are symbols there
        return run, None
    return run, (tuple(top_k_index.shape), num_experts, top_k_index.device)


def plan_of_slots(plan: RoutingPlan, num_experts_per_tok: int) -> RoutingPlan:
    """The same rows in the same order, where every slot (t, k) is a token of its own.

    Ops take it for tensors of T * K rows, of which row ``t * K + k`` belongs to slot k of token t.

    Args:
        plan: of T tokens with K slots each.
        num_experts_per_tok: K.

    Returns:
        ``plan`` itself if K is 1; otherwise a plan of T * K tokens with one slot each.
    """
    if num_experts_per_tok == 1:
        return plan
    made = RoutingPlan(
        plan.expert_offsets, plan.row_to_slot, plan.row_to_slot, plan.slot_to_row, plan.tiles
    )
    if plan.layout is not None:
        (tokens, slots), num_experts, device = plan.layout
        object.__setattr__(made, "layout", ((tokens * slots, 1), num_experts, device))
    return made


def _tile_schedule(expert_offsets: Tensor, num_rows: int, block_size: int) -> Tensor:
    """Return the [n, 2] pairs (first row, expert) of ``RoutingPlan.tiles``; without a sync."""
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
