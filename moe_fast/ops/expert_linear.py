"""expert_linear: one linear map per expert, summed with the routing weights.

    y_t = sum over k of w[t, k] * (W[e] . x_t + b[e]),   e = e(t, k)

The mixture of targets "intermediate" and "output", taken over one projection of the MLP only.

Backward, for a row of expert e with upstream gradient dO (before the weight w), u = dO . W[e]:

    dx = sum over k of w * u;  dw = <u, x> + <dO, b[e]>
    dW[e] = sum of (w dO)^T x;  db[e] = sum of w dO

Source: Yu, arXiv 2412.17364.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fast.ops import backends, native
from moe_fast.ops.checks import (
    FLOAT_DTYPES,
    autocast_to,
    check_dtype,
    check_like,
    check_shape,
    without_autocast,
)
from moe_fast.ops.plan import RoutingPlan
from moe_fast.ops.rows import check_plan, combine, new_rows, slot_values
from moe_fast.ops.shortcut import register_op


def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top_k_weights: Tensor,
    plan: RoutingPlan,
    *,
    backend: str | None = None,
) -> Tensor:
    """The mixture of linear maps; see the module's docstring for the mathematics.

    Args:
        x: [T, I].
        weight: [E, O, I].
        bias: [E, O] or ``None``.
        top_k_weights: [T, K] float32 or float64, from :func:`route`.
        plan: from :func:`plan` of the same route.
        backend: see :func:`moe_fast.use_backend`.

    Returns:
        [T, O] in x's dtype (autocast's under autocast). Skipped slots contribute exactly 0.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit.
    """
    check_shape("x", x, (None, None), "[T, I]")
    check_shape("weight", weight, (None, None, x.shape[1]), "[E, O, I]")
    if not (weight.shape[1] and weight.shape[2]):
        raise ValueError(f"O and I must be at least 1; got {list(weight.shape[1:])}.")
    if bias is not None:
        check_shape("bias", bias, tuple(weight.shape[:2]), "[E, O]")
    check_dtype("x", x, FLOAT_DTYPES)
    check_like("x", x, weight=weight, bias=bias)
    check_plan(x, top_k_weights, plan, weight.shape[0])
    x, weight, bias = autocast_to(x.device, x, weight, bias)
    computed_in = torch.promote_types(x.dtype, top_k_weights.dtype)
    run = backends.select("expert_linear", backend, x.device, computed_in)
    return run(
        x,
        weight,
        bias,
        top_k_weights,
        plan.expert_offsets,
        plan.row_to_token,
        plan.row_to_slot,
        plan.slot_to_row,
    )


@torch.library.custom_op("moe_fast::expert_linear", mutates_args=())
@without_autocast
def _expert_linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top_k_weights: Tensor,
    expert_offsets: Tensor,
    row_to_token: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
) -> Tensor:
    rows = new_rows(x, row_to_token.shape[0], weight.shape[1])
    offsets = expert_offsets.tolist()
    for e, (first, last) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        if first < last:
            row_bias = None if bias is None else bias[e]
            rows[first:last] = F.linear(x[row_to_token[first:last]], weight[e], row_bias)
    return combine(rows, slot_to_row, top_k_weights)


def _expert_linear_cpp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top_k_weights: Tensor,
    expert_offsets: Tensor,
    row_to_token: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
) -> Tensor:
    """kernels/csrc/cpu/expert_linear.cpp."""
    return native.call(
        torch.ops.moe_fast_cpp.expert_linear,
        *(x, weight, bias, top_k_weights, expert_offsets, row_to_token, row_to_slot, slot_to_row),
    )


@_expert_linear_op.register_fake
def fake(x, weight, *rest):
    """Shape of the forward op's result, on every backend."""
    return x.new_empty((x.shape[0], weight.shape[1]))


@torch.library.custom_op("moe_fast::expert_linear_backward", mutates_args=())
@without_autocast
def _expert_linear_backward_op(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top_k_weights: Tensor,
    expert_offsets: Tensor,
    row_to_token: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Experts without rows keep the zeros; an absent bias gets a gradient nobody reads.
    grad_weight, grad_bias = weight.new_zeros(weight.shape), x.new_zeros(weight.shape[:2])
    grad_rows = new_rows(x, row_to_token.shape[0], x.shape[1])
    grad_row_weights = top_k_weights.new_empty(row_to_token.shape[0])
    offsets = expert_offsets.tolist()
    for e, (first, last) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        if first == last:
            continue
        here = slice(first, last)
        rows_x, grad_out = x[row_to_token[here]], grad_y[row_to_token[here]]
        grad_rows[here] = grad_out @ weight[e]
        row_weight = top_k_weights.reshape(-1)[row_to_slot[here]]
        grad_row_weights[here] = (grad_rows[here].to(row_weight.dtype) * rows_x).sum(-1)
        if bias is not None:
            dtype = row_weight.dtype
            grad_row_weights[here] += grad_out.to(dtype) @ bias[e].to(dtype)
        grad_out = (grad_out * row_weight[:, None]).to(x.dtype)
        grad_weight[e], grad_bias[e] = grad_out.t() @ rows_x, grad_out.sum(0)
    grad_x = combine(grad_rows, slot_to_row, top_k_weights)
    grad_weights = slot_values(grad_row_weights, slot_to_row, top_k_weights.shape)
    return grad_x, grad_weight, grad_bias, grad_weights


def _linear_cpp_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top_k_weights: Tensor,
    expert_offsets: Tensor,
    row_to_token: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return native.call(
        torch.ops.moe_fast_cpp.expert_linear_backward,
        *(grad_y, x, weight, bias, top_k_weights),
        *(expert_offsets, row_to_token, row_to_slot, slot_to_row),
    )


@_expert_linear_backward_op.register_fake
def fake_backward(grad_y, x, weight, bias, top_k_weights, *rest):
    """Shapes of the backward op's results, on every backend."""
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(weight.shape[:2]),
        top_k_weights.new_empty(top_k_weights.shape),
    )


def save_for_backward(ctx, inputs, output):
    """Keep the op's tensors."""
    ctx.save_for_backward(*inputs)


def backward(op, ctx, grad_y):
    """The gradients of the forward op's inputs, by the backward op ``op``."""
    tensors = ctx.saved_tensors  # read once: gradient checkpointing unpacks at each read
    bias = tensors[2]
    grads = op(grad_y, *tensors)
    grad_x, grad_weight, grad_bias, grad_weights = grads
    return grad_x, grad_weight, None if bias is None else grad_bias, grad_weights, *[None] * 4


_expert_linear_op.register_autograd(
    functools.partial(backward, _expert_linear_backward_op), setup_context=save_for_backward
)
backends.register("expert_linear", "torch", _expert_linear_op)
_run_expert_linear_cpp = register_op(
    "moe_fast::expert_linear_cpp",
    _expert_linear_cpp,
    fake,
    save_for_backward,
    functools.partial(
        backward,
        register_op("moe_fast::expert_linear_cpp_backward", _linear_cpp_backward, fake_backward),
    ),
)
backends.register(
    "expert_linear",
    "cpp",
    _run_expert_linear_cpp,
    native.why_no_products,
    leaves_to_torch=(torch.float64,),
)
