"""expert_linear on a GPU: grouped products by Triton; formulas in ``__init__.py``.

The functions take the arguments of those in ``reference.py``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_fast.ops import triton_backend
from moe_fast.ops.expert_linear.reference import OPERATION


def forward(*inputs: Any) -> Tensor:
    """Compute y [T, O]."""
    from moe_fast.triton_ops.combine import combine
    from moe_fast.triton_ops.linear import linear

    x, weight, bias, w, *plan, slot_to_row = inputs
    w = w.contiguous()
    if w.shape[1] == 1:  # one row per token: write rows in token order
        return linear(x, weight, bias, w, plan, gather=True, scatter=True)
    rows = linear(x, weight, bias, None, plan, gather=True, scatter=False)
    return combine(rows, slot_to_row, w, w.shape[1])


def gradients(grad_y: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of x, weight, bias and routing weights."""
    from moe_fast.triton_ops.column_sum import column_sum
    from moe_fast.triton_ops.combine import combine
    from moe_fast.triton_ops.grad_weight import grad_weight
    from moe_fast.triton_ops.linear import linear
    from moe_fast.triton_ops.router_grad import router_grad

    x, weight, bias, w, *plan, slot_to_row = inputs
    w = w.contiguous()
    rows = linear(grad_y, weight.mT, None, None, plan, gather=True, scatter=False)
    grad_x = combine(rows, slot_to_row, w, w.shape[1])
    grad_w = router_grad(None, (rows, x), grad_y, bias, w, plan)
    grad_weights = grad_weight(grad_y, x, w, plan, gather_a=True, gather_b=True)
    absent = x.new_zeros(weight.shape[:2]) if bias is None else None
    grad_bias = column_sum(grad_y, w, plan) if absent is None else absent
    return grad_x, grad_weights, grad_bias, grad_w


run = OPERATION.implement(
    "expert_linear_triton", triton_backend.on_device(forward), triton_backend.on_device(gradients)
)
triton_backend.offer("expert_linear", run)
