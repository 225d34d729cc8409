"""plan in PyTorch: a stable sort by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.checks import checks_values
from moe_fast.ops.eager_dispatch import Operation


def check_not_negative(top_k_index: Tensor) -> None:
    """Raise ``ValueError`` for negative ids, if values are checked."""
    if checks_values(top_k_index.device) and (top_k_index < 0).any():
        raise ValueError(f"top_k_index must not be negative; got {int(top_k_index.min())}.")


def _plan(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flat = top_k_index.reshape(-1).to(torch.int64)
    check_not_negative(flat)
    # Negative ids, which are not checked on a GPU, are skipped: no access is out of bounds.
    expert = torch.where((flat < 0) | (flat > num_experts), num_experts, flat)
    row_to_slot = torch.argsort(expert, stable=True)
    counts = torch.bincount(expert, minlength=num_experts + 1)
    expert_offsets = torch.cat((counts.new_zeros(1), counts[:num_experts].cumsum(0)))
    rows = torch.arange(flat.shape[0], device=flat.device)
    slot_to_row = torch.empty_like(rows).scatter_(0, row_to_slot, rows)
    slot_to_row = torch.where(expert < num_experts, slot_to_row, -1)
    return expert_offsets, row_to_slot // top_k_index.shape[1], row_to_slot, slot_to_row


def _fake(top_k_index, num_experts):
    def empty(size):
        return top_k_index.new_empty((size,), dtype=torch.int64)

    rows = top_k_index.shape[0] * top_k_index.shape[1]
    return empty(num_experts + 1), empty(rows), empty(rows), empty(rows)


OPERATION = Operation(_plan, _fake)
backends.register("plan", "torch", OPERATION.implement("plan", _plan))
