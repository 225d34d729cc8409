"""combine_rows in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.eager_dispatch import Operation
from moe_fast.ops.plan_checks import combine


def _combine_rows(
    rows: Tensor, top_k_weights: Tensor, expert_offsets: Tensor, slot_to_row: Tensor
) -> Tensor:
    return combine(rows, slot_to_row, top_k_weights)


def _fake(rows, top_k_weights, expert_offsets, slot_to_row):
    return rows.new_empty((top_k_weights.shape[0], rows.shape[1]))


def _combine_rows_backward(grad_y, rows, top_k_weights, expert_offsets, slot_to_row):
    row = slot_to_row.view(top_k_weights.shape)
    valid = (row >= 0)[..., None]
    upstream = grad_y[:, None].to(torch.promote_types(rows.dtype, top_k_weights.dtype))
    grad_weights = torch.where(valid, rows[row] * upstream, 0).sum(-1).to(top_k_weights.dtype)
    # Skipped slots (-1) write into an additional row, which is cut off.
    grad_rows = rows.new_zeros(rows.shape[0] + 1, rows.shape[1])
    grad_rows[row] = torch.where(valid, upstream * top_k_weights[..., None], 0).to(rows.dtype)
    return grad_rows[:-1].clone(), grad_weights


def _fake_backward(grad_y, rows, top_k_weights, expert_offsets, slot_to_row):
    return rows.new_empty(rows.shape), top_k_weights.new_empty(top_k_weights.shape)


OPERATION = Operation(_combine_rows, _fake, _fake_backward, differentiable=2)
combine_rows = OPERATION.implement("combine_rows", _combine_rows, _combine_rows_backward)
backends.register("combine_rows", "torch", combine_rows)
