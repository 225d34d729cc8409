"""gather_rows in PyTorch; its gradient is ``combine_rows`` on the same backend."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.combine_rows.reference import combine_rows
from moe_fast.ops.eager_dispatch import register_op, schema_of


def _gather_rows(
    x: Tensor, expert_offsets: Tensor, row_to_token: Tensor, slot_to_row: Tensor
) -> Tensor:
    row = torch.arange(row_to_token.shape[0], device=x.device)
    return torch.where((row < expert_offsets[-1])[:, None], x[row_to_token], 0)


def _fake(x, expert_offsets, row_to_token, slot_to_row):
    return x.new_empty((row_to_token.shape[0], x.shape[1]))


def _save_for_backward(ctx, inputs, output):
    x, expert_offsets, _, slot_to_row = inputs
    ctx.save_for_backward(expert_offsets, slot_to_row)
    ctx.num_tokens = x.shape[0]


def _gradients(combine_rows, ctx, grad_rows):
    expert_offsets, slot_to_row = ctx.saved_tensors  # read only once, see docs/decisions.md
    per_token = slot_to_row.shape[0] // max(ctx.num_tokens, 1)
    dtype = torch.promote_types(grad_rows.dtype, torch.float32)
    ones = grad_rows.new_ones((ctx.num_tokens, per_token), dtype=dtype)
    return combine_rows(grad_rows, ones, expert_offsets, slot_to_row), None, None, None


def implement(name: str, forward: Callable, combine_rows: Callable) -> Callable:
    """Register ``forward``; its gradient is computed by ``combine_rows`` of the same backend."""
    gradients = functools.partial(_gradients, combine_rows)
    schema = schema_of(_gather_rows)
    return register_op(f"moe_fast::{name}", schema, forward, _fake, _save_for_backward, gradients)


backends.register("gather_rows", "torch", implement("gather_rows", _gather_rows, combine_rows))
