"""expert_mlp on a GPU: grouped products by Triton; formulas in ``__init__.py``.

There are six products, as in ``kernels/triton_ops``. Forward: up (with bias and activation) and
down (with bias and routing weight). Backward: dh (with everything that follows elementwise), dW2,
dx and dW1. x and z are saved. The functions take the arguments of those in ``reference.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moe_fast.ops import triton_backend
from moe_fast.ops.expert_mlp.plain_weights import backward_on_plain, forward_on_plain
from moe_fast.ops.expert_mlp.reference import OPERATION


def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Compute y [T, D], and z for the backward pass (no rows unless ``save``)."""
    from moe_fast.triton_ops.combine import combine

    x, *weights, w, offsets, row_to_token, row_to_slot, slot_to_row, act, gated, save = inputs
    plan, w = (offsets, row_to_token, row_to_slot), w.contiguous()
    if w.shape[1] == 1:  # one row per token: write rows in token order
        return expert_rows(x, weights, plan, act, gated, save, by_token=w)
    rows, z = expert_rows(x, weights, plan, act, gated, save)
    return combine(rows, slot_to_row, w, w.shape[1]), z


def expert_rows(
    x: Tensor,
    weights: Sequence[Tensor | None],
    plan: tuple[Tensor, Tensor, Tensor],
    act: str,
    gated: bool,
    save: bool,
    by_token: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute f_e of every row, [S, D], and z (no rows unless ``save``); S = T * K.

    Skipped rows are not written.

    Args:
        weights: up_proj, down_proj and their biases.
        plan: expert_offsets, row_to_token and row_to_slot.
        by_token: routing weights [T, 1], only for K = 1. The rows are multiplied by them and stored
            in token order: the first result is then y [T, D].
    """
    from moe_fast.triton_ops.linear import linear
    from moe_fast.triton_ops.up_projection import up_projection

    up_proj, down_proj, up_bias, down_bias = weights
    form = dict(act=act, gated=gated, want_z=save, want_h=True)
    z, h = up_projection(x, up_proj, up_bias, *plan[:2], **form)
    scatter = by_token is not None
    return linear(h, down_proj, down_bias, by_token, plan, gather=False, scatter=scatter), z


def gradients(grad_y: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Compute the gradients of the six tensors."""
    from moe_fast.triton_ops.column_sum import column_sum
    from moe_fast.triton_ops.combine import combine
    from moe_fast.triton_ops.grad_hidden import grad_hidden
    from moe_fast.triton_ops.grad_weight import grad_weight
    from moe_fast.triton_ops.linear import linear
    from moe_fast.triton_ops.router_grad import router_grad
    from moe_fast.triton_ops.up_projection import up_projection

    x, up_proj, down_proj, up_bias, down_bias, w, *indices, z, act, gated = inputs
    *plan, slot_to_row = indices
    w, form = w.contiguous(), dict(act=act, gated=gated)
    if z.shape[0] != plan[1].shape[0]:
        z, _ = up_projection(x, up_proj, up_bias, *plan[:2], **form, want_z=True, want_h=False)
    grad_z, weighted_h, dots, grad_up_bias = grad_hidden(
        grad_y, down_proj, z, w, plan, **form, want_bias=up_bias is not None
    )
    # The gradients of absent biases are not read.
    if up_bias is None:
        grad_up_bias = x.new_zeros(up_proj.shape[:2])
    if down_bias is None:
        grad_down_bias = x.new_zeros(down_proj.shape[:2])
    else:
        grad_down_bias = column_sum(grad_y, w, plan)
    grad_w = router_grad(dots, None, grad_y, down_bias, w, plan)
    grad_down = grad_weight(grad_y, weighted_h, None, plan, gather_a=True, gather_b=False)
    grad_up = grad_weight(grad_z, x, None, plan, gather_a=False, gather_b=True)
    # dz contains the routing weight already.
    k = w.shape[1]
    grad_x = linear(grad_z, up_proj.mT, None, None, plan, gather=False, scatter=k == 1)
    if k > 1:
        grad_x = combine(grad_x, slot_to_row, None, k)
    return grad_x, grad_up, grad_down, grad_up_bias, grad_down_bias, grad_w


run = OPERATION.implement(
    "expert_mlp_triton",
    triton_backend.on_device(forward_on_plain(forward)),
    triton_backend.on_device(backward_on_plain(gradients)),
)
triton_backend.offer("expert_mlp", run)
