"""What the kernel tests share: rows sorted by expert, and guarded inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The first three are a plan, as the launchers take it."""

    offsets: Tensor
    row_to_token: Tensor
    row_to_slot: Tensor
    slot_to_row: Tensor
    expert: list[int]  # of each valid row

    @property
    def plan(self) -> tuple[Tensor, Tensor, Tensor]:
        return self[:3]


def sorted_rows(counts: list[int], skipped: int, k: int) -> Rows:
    """Random slots, ``counts[e]`` of them for expert e, and ``skipped`` more; by Python loops."""
    expert = [e for e, count in enumerate(counts) for _ in range(count)] + [-1] * skipped
    assert len(expert) % k == 0
    order = torch.randperm(len(expert)).tolist()
    by_slot = [expert[i] for i in order]
    slots = [s for e in [*range(len(counts)), -1] for s in range(len(order)) if by_slot[s] == e]
    slot_to_row = [-1] * len(slots)
    for row, slot in enumerate(slots[: sum(counts)]):
        slot_to_row[slot] = row
    offsets = [sum(counts[:e]) for e in range(len(counts) + 1)]
    tokens = [slot // k for slot in slots]
    return Rows(
        *(torch.tensor(v) for v in (offsets, tokens, slots, slot_to_row)), expert[: sum(counts)]
    )


def guarded(tensor: Tensor) -> Tensor:
    """The same values with NaN in the memory before and behind them."""
    pad = torch.full((64,), float("nan"), dtype=tensor.dtype)
    buffer = torch.cat((pad, tensor.reshape(-1), pad))
    return buffer[64:-64].view(tensor.shape)
