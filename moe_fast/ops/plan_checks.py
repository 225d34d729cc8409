"""Works with plans: checks one, iterates over its experts, sums over the K slots of a token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_fast.ops.checks import check_dtype, check_like, check_shape
from moe_fast.ops.plan import RoutingPlan


def check_plan(x: Tensor, top_k_weights: Tensor, plan: RoutingPlan, num_experts: int) -> None:
    """Raise unless ``plan`` and ``top_k_weights`` [T, K] fit ``x`` [T, D] and E experts."""
    if not isinstance(plan, RoutingPlan):
        raise TypeError(f"plan must be a RoutingPlan, from ops.plan; got {type(plan).__name__}.")
    if num_experts < 1:
        raise ValueError("there must be at least one expert; got weights of E = 0.")
    check_shape("top_k_weights", top_k_weights, (x.shape[0], None), "[T, K]")
    check_dtype("top_k_weights", top_k_weights, (torch.float32, torch.float64))
    check_shape("plan.expert_offsets", plan.expert_offsets, (num_experts + 1,), "[E + 1]")
    rows = x.shape[0] * top_k_weights.shape[1]
    for name in ("row_to_token", "row_to_slot", "slot_to_row"):
        check_shape(f"plan.{name}", getattr(plan, name), (rows,), "[T * K]")
    check_like("x", x, dtype=False, top_k_weights=top_k_weights, expert_offsets=plan.expert_offsets)


def experts_with_rows(expert_offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, and the slice of its rows."""
    offsets = expert_offsets.tolist()
    for expert, (first, last) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if first < last:
            yield expert, slice(first, last)


def combine(rows: Tensor, slot_to_row: Tensor, weights: Tensor) -> Tensor:
    """Compute ``y[t] = sum_k weights[t, k] * rows[slot_to_row[t, k]]``; skipped slots add 0.

    Args:
        rows: [S, D]; rows that no slot refers to may hold anything.
        slot_to_row: [S]; -1 means skipped.
        weights: [T, K], S = T * K; those of skipped slots are not used.

    Returns:
        [T, D] in the dtype of ``rows``; the sum is computed in the wider of the two dtypes. Slots
        are summed in their order, so the result is deterministic.
    """
    row = slot_to_row.view(weights.shape)
    terms = rows[row] * weights[..., None]  # [T, K, D]
    return torch.where(row[..., None] >= 0, terms, 0).sum(1).to(rows.dtype)


def slot_values(row_values: Tensor, slot_to_row: Tensor, shape: torch.Size) -> Tensor:
    """Return the values of rows [S] at their slots [T, K]; 0 for skipped slots."""
    row = slot_to_row.view(shape)
    return torch.where(row >= 0, row_values[row], 0)
