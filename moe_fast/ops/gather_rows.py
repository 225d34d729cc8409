"""gather_rows: each token's vector at its rows, in the order in which experts see them.

    rows[r] = x[row_to_token[r]]        0 in the skipped rows behind expert_offsets[E]

With :func:`combine_rows` this is all that an expert of one's own needs: what lies between the two
sees contiguous rows, ``expert_offsets[e] .. expert_offsets[e + 1]`` for expert e. (``expert_mlp``
gathers inside its products, and needs neither.) The gradient of a token is the sum over its rows,
which is ``combine_rows`` with weights of 1.

Source: the permutation of MegaBlocks, arXiv 2211.15841, without its padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_fast.ops import backends, native
from moe_fast.ops.checks import FLOAT_DTYPES, check_dtype, check_like, check_shape
from moe_fast.ops.combine_rows import combine_rows_cpp, combine_rows_op
from moe_fast.ops.plan import RoutingPlan
from moe_fast.ops.shortcut import register_op


def gather_rows(x: Tensor, plan: RoutingPlan, *, backend: str | None = None) -> Tensor:
    """The rows of ``plan``, each a copy of its token's vector.

    Args:
        x: [T, D].
        plan: from :func:`plan`, of T tokens.
        backend: see :func:`moe_fast.use_backend`.

    Returns:
        [S, D] in the dtype of x, also under autocast: nothing is computed.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit; the ``cpp`` backend on
            the CPU also for index tensors that are no plan.
    """
    check_shape("x", x, (None, None), "[T, D]")
    check_dtype("x", x, FLOAT_DTYPES)
    slots = plan.row_to_token.shape[0]
    if slots % x.shape[0] if x.shape[0] else slots:
        raise ValueError(
            f"plan must be of the {x.shape[0]} tokens of x; got {slots} rows, no multiple of it."
        )
    check_shape("plan.slot_to_row", plan.slot_to_row, (slots,), "[S]")
    check_like("x", x, dtype=False, expert_offsets=plan.expert_offsets)
    run = backends.select("gather_rows", backend, x.device, x.dtype)
    return run(x, plan.expert_offsets, plan.row_to_token, plan.slot_to_row)


@torch.library.custom_op("moe_fast::gather_rows", mutates_args=())
def _gather_rows_op(
    x: Tensor, expert_offsets: Tensor, row_to_token: Tensor, slot_to_row: Tensor
) -> Tensor:
    row = torch.arange(row_to_token.shape[0], device=x.device)
    return torch.where((row < expert_offsets[-1])[:, None], x[row_to_token], 0)


def _gather_rows_cpp(
    x: Tensor, expert_offsets: Tensor, row_to_token: Tensor, slot_to_row: Tensor
) -> Tensor:
    """kernels/csrc/cpu/rows.cpp and kernels/csrc/cuda/rows.cu."""
    return native.call(torch.ops.moe_fast_cpp.gather_rows, x, expert_offsets, row_to_token)


@_gather_rows_op.register_fake
def _fake(x, expert_offsets, row_to_token, slot_to_row):
    return x.new_empty((row_to_token.shape[0], x.shape[1]))


def _save_for_backward(ctx, inputs, output):
    x, expert_offsets, _, slot_to_row = inputs
    ctx.save_for_backward(expert_offsets, slot_to_row)
    ctx.num_tokens = x.shape[0]


def _backward(combine: Callable, ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None, None]:
    expert_offsets, slot_to_row = ctx.saved_tensors  # read once, see docs/decisions.md
    per_token = slot_to_row.shape[0] // max(ctx.num_tokens, 1)
    dtype = torch.promote_types(grad_rows.dtype, torch.float32)
    ones = grad_rows.new_ones((ctx.num_tokens, per_token), dtype=dtype)
    return combine(grad_rows, ones, expert_offsets, slot_to_row), None, None, None


_gather_rows_op.register_autograd(
    functools.partial(_backward, combine_rows_op), setup_context=_save_for_backward
)
backends.register("gather_rows", "torch", _gather_rows_op)
_run_gather_rows_cpp = register_op(
    "moe_fast::gather_rows_cpp",
    _gather_rows_cpp,
    _fake,
    _save_for_backward,
    functools.partial(_backward, combine_rows_cpp),
)
backends.register(
    "gather_rows",
    "cpp",
    _run_gather_rows_cpp,
    native.why_unavailable,
    leaves_to_torch=(torch.float64,),
)
