"""combine_rows: the weighted sum of each token's rows, from expert order back to token order.

    y[t] = sum over k of w[t, k] * rows[slot_to_row[t, k]]        skipped slots contribute exactly 0

Backward, with upstream gradient dy:

    drows[r] = w[slot of r] * dy[token of r]        0 in skipped rows
    dw[t, k] = <rows[slot_to_row[t, k]], dy[t]>     0 for skipped slots

A gather, not a scatter: no atomics, slots are summed in their order, the result is deterministic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_fast.ops import backends, native
from moe_fast.ops.checks import FLOAT_DTYPES, check_dtype, check_like, check_shape
from moe_fast.ops.plan import RoutingPlan
from moe_fast.ops.shortcut import register_op


def combine_rows(
    rows: Tensor, top_k_weights: Tensor, plan: RoutingPlan, *, backend: str | None = None
) -> Tensor:
    """The weighted sum of each token's rows.

    Args:
        rows: [S, D], in the order of ``plan``; skipped rows are not read.
        top_k_weights: [T, K] float32 or float64, S = T * K. Those of skipped slots are not used.
        plan: from :func:`plan`.
        backend: see :func:`moe_fast.use_backend`.

    Returns:
        [T, D] in the dtype of ``rows``, also under autocast. The sum runs in the wider one of the
        two dtypes and is rounded once.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit; the ``cpp`` backend on
            the CPU also for index tensors that are no plan.
    """
    check_shape("top_k_weights", top_k_weights, (None, None), "[T, K]")
    check_dtype("top_k_weights", top_k_weights, (torch.float32, torch.float64))
    slots = top_k_weights.shape[0] * top_k_weights.shape[1]
    check_shape("rows", rows, (slots, None), "[T * K, D]")
    check_dtype("rows", rows, FLOAT_DTYPES)
    check_shape("plan.slot_to_row", plan.slot_to_row, (slots,), "[T * K]")
    offsets = plan.expert_offsets
    check_like("rows", rows, dtype=False, top_k_weights=top_k_weights, expert_offsets=offsets)
    computed_in = torch.promote_types(rows.dtype, top_k_weights.dtype)
    run = backends.select("combine_rows", backend, rows.device, computed_in)
    return run(rows, top_k_weights, offsets, plan.slot_to_row)


@torch.library.custom_op("moe_fast::combine_rows", mutates_args=())
def combine_rows_op(
    rows: Tensor, top_k_weights: Tensor, expert_offsets: Tensor, slot_to_row: Tensor
) -> Tensor:
    """The reference."""
    row = slot_to_row.view(top_k_weights.shape)[..., None]
    terms = rows[row.squeeze(-1)] * top_k_weights[..., None]  # [T, K, D]
    return torch.where(row >= 0, terms, 0).sum(1).to(rows.dtype)


def _combine_rows_cpp(
    rows: Tensor, top_k_weights: Tensor, expert_offsets: Tensor, slot_to_row: Tensor
) -> Tensor:
    """kernels/csrc/cpu/rows.cpp and kernels/csrc/cuda/rows.cu."""
    return native.call(torch.ops.moe_fast_cpp.combine_rows, rows, top_k_weights, slot_to_row)


@combine_rows_op.register_fake
def _fake(rows, top_k_weights, expert_offsets, slot_to_row):
    return rows.new_empty((top_k_weights.shape[0], rows.shape[1]))


@torch.library.custom_op("moe_fast::combine_rows_backward", mutates_args=())
def _backward_op(
    grad_y: Tensor,
    rows: Tensor,
    top_k_weights: Tensor,
    expert_offsets: Tensor,
    slot_to_row: Tensor,
) -> tuple[Tensor, Tensor]:
    row = slot_to_row.view(top_k_weights.shape)
    valid = (row >= 0)[..., None]
    upstream = grad_y[:, None].to(torch.promote_types(rows.dtype, top_k_weights.dtype))
    grad_weights = torch.where(valid, rows[row] * upstream, 0).sum(-1).to(top_k_weights.dtype)
    # Skipped slots, -1, write into one more row, which is cut off.
    grad_rows = rows.new_zeros(rows.shape[0] + 1, rows.shape[1])
    grad_rows[row] = torch.where(valid, upstream * top_k_weights[..., None], 0).to(rows.dtype)
    return grad_rows[:-1].clone(), grad_weights


def _cpp_backward(
    grad_y: Tensor,
    rows: Tensor,
    top_k_weights: Tensor,
    expert_offsets: Tensor,
    slot_to_row: Tensor,
) -> tuple[Tensor, Tensor]:
    return native.call(
        torch.ops.moe_fast_cpp.combine_rows_backward,
        *(grad_y, rows, top_k_weights, expert_offsets, slot_to_row),
    )


@_backward_op.register_fake
def _fake_backward(grad_y, rows, top_k_weights, expert_offsets, slot_to_row):
    return rows.new_empty(rows.shape), top_k_weights.new_empty(top_k_weights.shape)


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(op: Callable, ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None, None]:
    rows, weights, expert_offsets, slot_to_row = ctx.saved_tensors  # read once
    grad_rows, grad_weights = op(grad_y, rows, weights, expert_offsets, slot_to_row)
    return grad_rows, grad_weights, None, None


combine_rows_op.register_autograd(
    functools.partial(_backward, _backward_op), setup_context=_save_for_backward
)
backends.register("combine_rows", "torch", combine_rows_op)
combine_rows_cpp = register_op(
    "moe_fast::combine_rows_cpp",
    _combine_rows_cpp,
    _fake,
    _save_for_backward,
    functools.partial(
        _backward, register_op("moe_fast::combine_rows_cpp_backward", _cpp_backward, _fake_backward)
    ),
)
backends.register(
    "combine_rows",
    "cpp",
    combine_rows_cpp,
    native.why_unavailable,
    leaves_to_torch=(torch.float64,),
)
