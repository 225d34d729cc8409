"""expert_mlp on a GPU: grouped products by Triton; formulas in ``__init__.py``.

Six products, as in ``kernels/triton_ops``: up (bias, activation), down (bias, routing weight);
backward: dh with everything that follows from it, dW2, dx, dW1. Saved: x and z.
"""

from __future__ import annotations

from torch import Tensor

from moe_fast.ops import triton_backend
from moe_fast.ops.expert_mlp.reference import OPERATION


def forward(
    x: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    top_k_weights: Tensor,
    expert_offsets: Tensor,
    row_to_token: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    act: str,
    gated: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y [T, D] and z (no rows unless ``save``), as the reference op."""
    from moe_fast.triton_ops.combine import combine

    weights = (up_proj, down_proj, up_proj_bias, down_proj_bias)
    plan, w = (expert_offsets, row_to_token, row_to_slot), top_k_weights.contiguous()
    if w.shape[1] == 1:  # one row per token: written where it belongs
        return expert_rows(x, *weights, *plan, act, gated, save, by_token=w)
    rows, z = expert_rows(x, *weights, *plan, act, gated, save)
    return combine(rows, slot_to_row, w, w.shape[1]), z


def expert_rows(
    x: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    expert_offsets: Tensor,
    row_to_token: Tensor,
    row_to_slot: Tensor,
    act: str,
    gated: bool,
    save: bool,
    by_token: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """f_e of every row [S, D], skipped rows unwritten, and z (no rows unless ``save``).

    Args:
        by_token: routing weights [T, 1]: multiply with them and store in token order, y [T, D].
    """
    from moe_fast.triton_ops.linear import linear
    from moe_fast.triton_ops.up_projection import up_projection

    plan, scatter = (expert_offsets, row_to_token, row_to_slot), by_token is not None
    form = dict(act=act, gated=gated)
    z, h = up_projection(x, up_proj, up_proj_bias, *plan[:2], **form, want_z=save, want_h=True)
    rows = linear(h, down_proj, down_proj_bias, by_token, *plan, gather=False, scatter=scatter)
    return rows, z


def gradients(
    grad_y: Tensor,
    x: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    top_k_weights: Tensor,
    expert_offsets: Tensor,
    row_to_token: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    saved: Tensor,
    act: str,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the six tensors, as the reference's backward op."""
    from moe_fast.triton_ops.column_sum import column_sum
    from moe_fast.triton_ops.grad_hidden import grad_hidden
    from moe_fast.triton_ops.grad_weight import grad_weight
    from moe_fast.triton_ops.router_grad import router_grad
    from moe_fast.triton_ops.up_projection import up_projection

    plan, w = (expert_offsets, row_to_token, row_to_slot), top_k_weights.contiguous()
    form = dict(act=act, gated=gated)
    z = saved
    if saved.shape[0] != row_to_token.shape[0]:
        z, _ = up_projection(x, up_proj, up_proj_bias, *plan[:2], **form, want_z=True, want_h=False)
    has_bias = up_proj_bias is not None
    grad_z, weighted_h, dots, grad_up_bias = grad_hidden(
        grad_y, down_proj, z, w, *plan, **form, want_bias=has_bias
    )
    if not has_bias:  # absent biases get a gradient nobody reads
        grad_up_bias = x.new_zeros(up_proj.shape[:2])
    if down_proj_bias is None:
        grad_down_bias = x.new_zeros(down_proj.shape[:2])
    else:
        grad_down_bias = column_sum(grad_y, w, *plan)
    grad_w = router_grad(dots, None, grad_y, down_proj_bias, w, *plan)
    grad_down = grad_weight(grad_y, weighted_h, None, *plan, gather_a=True, gather_b=False)
    grad_up = grad_weight(grad_z, x, None, *plan, gather_a=False, gather_b=True)
    grad_x = _input_gradient(grad_z, up_proj, *plan, slot_to_row, w.shape[1])
    return grad_x, grad_up, grad_down, grad_up_bias, grad_down_bias, grad_w


def _input_gradient(
    grad_z: Tensor,
    up_proj: Tensor,
    expert_offsets: Tensor,
    row_to_token: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    k: int,
) -> Tensor:
    """[T, D]; the routing weight is in dz already."""
    from moe_fast.triton_ops.combine import combine
    from moe_fast.triton_ops.linear import linear

    plan = (expert_offsets, row_to_token, row_to_slot)
    rows = linear(grad_z, up_proj.mT, None, None, *plan, gather=False, scatter=k == 1)
    return rows if k == 1 else combine(rows, slot_to_row, None, k)


run = OPERATION.implement(
    "expert_mlp_triton", triton_backend.on_device(forward), triton_backend.on_device(gradients)
)
triton_backend.offer("expert_mlp", run)
