"""expert_mlp on a GPU: grouped products by Triton; formulas in ``__init__.py``.

There are six products, as in ``kernels/triton_ops``. Forward: up (with bias and activation) and
down (with bias and routing weight). Backward: dh (with everything that follows elementwise), dW2,
dx and dW1. x and z are saved. The functions take the arguments of those in ``reference.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from moe_fast.ops import triton_backend
from moe_fast.ops.expert_mlp.plain_weights import backward_on_plain, forward_on_plain
from moe_fast.ops.expert_mlp.reference import OPERATION


def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Compute y [T, D], and z for the backward pass (no rows unless ``save``)."""
    from moe_fast.triton_ops.combine import combine

    x, *weights, w, offsets, row_to_token, row_to_slot, slot_to_row, act, gated, save = inputs
    order, w = order_of(x, offsets, row_to_token, row_to_slot, slot_to_row), w.contiguous()
    if w.shape[1] == 1:  # one row per token: write rows in token order
        return expert_rows(x, weights, order, act, gated, save, by_token=w)
    rows, z = expert_rows(x, weights, order, act, gated, save)
    return combine(rows, order.slot_to_row, w, w.shape[1]), z


@dataclass(frozen=True)
class Order:
    """The rows as the kernels see them: those of the plan, or padded.

    Attributes:
        plan: expert_offsets, row_to_token and row_to_slot.
        slot_to_row: [S].
        padded: the padded plan whose tensors these are, or ``None``.
    """

    plan: tuple[Tensor, Tensor, Tensor]
    slot_to_row: Tensor
    padded: Any

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return self.plan[1].shape[0]

    def rows_of(self, x: Tensor) -> Tensor:
        """Return x [T, N] as the first operand of a product: sorted, if the plan is padded."""
        from moe_fast.triton_ops.padded_plan import sort_rows

        return x if self.padded is None else sort_rows(x, self.padded)


def order_of(x: Tensor, *indices: Tensor) -> Order:
    """Return the order of the rows of x, from the plan's four index tensors."""
    from moe_fast.triton_ops import launch_config
    from moe_fast.triton_ops.padded_plan import pad_plan

    offsets, row_to_token, row_to_slot, slot_to_row = indices
    plan = (offsets, row_to_token, row_to_slot)
    if not launch_config.pads_experts(x, row_to_token.shape[0], offsets.shape[0] - 1):
        return Order(plan, slot_to_row, None)
    padded = pad_plan(plan)
    return Order(padded[:3], padded.slot_to_row, padded)


def saved_rows(x: Tensor, row_to_token: Tensor, num_experts: int) -> int:
    """Return the number of rows of z."""
    from moe_fast.triton_ops import launch_config
    from moe_fast.triton_ops.padded_plan import padded_rows

    count = row_to_token.shape[0]
    pads = launch_config.pads_experts(x, count, num_experts)
    return padded_rows(count, num_experts) if pads else count


def expert_rows(
    x: Tensor,
    weights: Sequence[Tensor | None],
    order: Order,
    act: str,
    gated: bool,
    save: bool,
    by_token: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute f_e of every row in order, and z of every row (no rows unless ``save``).

    Skipped rows, and those that pad, are not written.

    Args:
        weights: up_proj, down_proj and their biases.
        order: of :func:`order_of`.
        by_token: routing weights [T, 1], only for K = 1. The rows are multiplied by them and stored
            in token order: the first result is then y [T, D].
    """
    from moe_fast.triton_ops.linear import linear
    from moe_fast.triton_ops.up_projection import up_projection

    up_proj, down_proj, up_bias, down_bias = weights
    padded = order.padded is not None
    form = dict(act=act, gated=gated, want_z=save, want_h=True, gather=not padded, padded=padded)
    z, h = up_projection(order.rows_of(x), up_proj, up_bias, *order.plan[:2], **form)
    form = dict(gather=False, scatter=by_token is not None, padded=order.padded)
    return linear(h, down_proj, down_bias, by_token, order.plan, **form), z


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
    order, w = order_of(x, *indices), w.contiguous()
    plan, padded = order.plan, order.padded is not None
    rows_x, rows_grad = order.rows_of(x), order.rows_of(grad_y)
    form = dict(act=act, gated=gated, gather=not padded, padded=padded)
    if z.shape[0] != order.num_rows:
        z, _ = up_projection(rows_x, up_proj, up_bias, *plan[:2], **form, want_z=True, want_h=False)
    grad_z, weighted_h, dots, grad_up_bias = grad_hidden(
        rows_grad, down_proj, z, w, plan, **form, want_bias=up_bias is not None
    )
    # The gradients of absent biases are not read.
    if up_bias is None:
        grad_up_bias = x.new_zeros(up_proj.shape[:2])
    if down_bias is None:
        grad_down_bias = x.new_zeros(down_proj.shape[:2])
    else:
        grad_down_bias = column_sum(grad_y, w, indices[:3])
    grad_w = router_grad(dots, None, grad_y, down_bias, w, plan)
    grad_down = grad_weight(
        rows_grad, weighted_h, None, plan, gather_a=not padded, gather_b=False, padded=padded
    )
    grad_up = grad_weight(
        grad_z, rows_x, None, plan, gather_a=False, gather_b=not padded, padded=padded
    )
    # dz contains the routing weight already.
    k = w.shape[1]
    to = dict(gather=False, scatter=k == 1, padded=order.padded)
    grad_x = linear(grad_z, up_proj.mT, None, None, plan, **to)
    if k > 1:
        grad_x = combine(grad_x, order.slot_to_row, None, k)
    return grad_x, grad_up, grad_down, grad_up_bias, grad_down_bias, grad_w


def _fake(x, up_proj, down_proj, *rest):
    y, z = OPERATION.fake(x, up_proj, down_proj, *rest)
    rows = saved_rows(x, rest[4], up_proj.shape[0]) if rest[-1] else 0
    return y, x.new_empty((rows, z.shape[1]))


run = replace(OPERATION, fake=_fake).implement(
    "expert_mlp_triton",
    triton_backend.on_device(forward_on_plain(forward)),
    triton_backend.on_device(backward_on_plain(gradients)),
)
triton_backend.offer("expert_mlp", run)
