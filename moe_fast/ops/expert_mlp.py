"""expert_mlp: every token through the MLPs of its K experts, summed with its routing weights.

    z   = W1[e] . x + b1[e]                      (gated: z = [z1, z2], first half activated)
    h   = act(z)                                 (gated: h = act(z1) * z2)
    f_e = W2[e] . h + b2[e]
    y_t = sum over k of w[t, k] * f_{e(t, k)}(x_t)

Backward, for a row of expert e with upstream gradient dO (before the weight w):

    dh = dO . W2[e];  dw = <dh, h> + <dO, b2[e]>;  dz = w * dh * act'(z)
    dW2[e] = sum of (w dO)^T h;  db2[e] = sum of w dO;  dW1[e] = sum of dz^T x;  db1[e] = sum of dz
    dx = sum over k of dz . W1[e]

Only x and z are saved; h is computed again from z. ``recompute="up"`` saves x alone.

Source: the expert of Hallee et al., arXiv 2401.15713; saving x and z as in SonicMoE.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fast.ops import backends, native
from moe_fast.ops.activations import ACTIVATIONS, activate, activate_backward
from moe_fast.ops.checks import (
    FLOAT_DTYPES,
    autocast_to,
    check_choice,
    check_dtype,
    check_like,
    check_shape,
    without_autocast,
)
from moe_fast.ops.plan import RoutingPlan
from moe_fast.ops.rows import check_plan, combine, new_rows, slot_values
from moe_fast.ops.shortcut import register_op


def expert_mlp(
    x: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    top_k_weights: Tensor,
    plan: RoutingPlan,
    *,
    act: str = "gelu",
    gated: bool = False,
    recompute: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """The mixture of expert MLPs; see the module's docstring for the mathematics.

    Args:
        x: [T, D].
        up_proj: [E, H, D]; gated: [E, 2H, D], activated half first.
        down_proj: [E, D, H].
        up_proj_bias, down_proj_bias: [E, H] (gated [E, 2H]) and [E, D], or ``None``.
        top_k_weights: [T, K] float32 or float64, from :func:`route`.
        plan: from :func:`plan` of the same route.
        act: a name of transformers' activations: gelu (exact), gelu_tanh, gelu_new,
            gelu_pytorch_tanh, relu, silu, swish.
        recompute: ``None``, or ``"up"`` to compute z again in the backward instead of saving it
            (less memory, one more product).
        backend: see :func:`moe_fast.use_backend`.

    Returns:
        [T, D] in x's dtype (autocast's under autocast). Skipped slots contribute exactly 0.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or names that do not fit.
    """
    check_expert_mlp(x, up_proj, down_proj, up_proj_bias, down_proj_bias, act, gated, recompute)
    check_plan(x, top_k_weights, plan, up_proj.shape[0])
    x, up_proj, down_proj, up_proj_bias, down_proj_bias = autocast_to(
        x.device, x, up_proj, down_proj, up_proj_bias, down_proj_bias
    )
    tensors = (x, up_proj, down_proj, up_proj_bias, down_proj_bias, top_k_weights)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    computed_in = torch.promote_types(x.dtype, top_k_weights.dtype)
    run = backends.select("expert_mlp", backend, x.device, computed_in)
    y, _ = run(
        *tensors,
        plan.expert_offsets,
        plan.row_to_token,
        plan.row_to_slot,
        plan.slot_to_row,
        act,
        gated,
        needs_grad and recompute is None,
    )
    return y


def check_expert_mlp(
    x: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    act: str,
    gated: bool,
    recompute: str | None,
) -> None:
    """Raise unless the tensors of an expert MLP fit each other, naming the argument."""
    check_choice("act", act, ACTIVATIONS)
    check_choice("recompute", recompute, (None, "up"))
    check_shape("x", x, (None, None), "[T, D]")
    check_shape("down_proj", down_proj, (None, x.shape[1], None), "[E, D, H]")
    num_experts, dim, hidden = down_proj.shape
    if not (dim and hidden):
        raise ValueError(f"D and H must be at least 1; got {dim} and {hidden}.")
    up_rows = 2 * hidden if gated else hidden
    letters = "[E, 2H, D]" if gated else "[E, H, D]"
    check_shape("up_proj", up_proj, (num_experts, up_rows, dim), letters)
    if up_proj_bias is not None:
        check_shape("up_proj_bias", up_proj_bias, (num_experts, up_rows), letters[:-4] + "]")
    if down_proj_bias is not None:
        check_shape("down_proj_bias", down_proj_bias, (num_experts, dim), "[E, D]")
    check_dtype("x", x, FLOAT_DTYPES)
    check_like(
        "x",
        x,
        up_proj=up_proj,
        down_proj=down_proj,
        up_proj_bias=up_proj_bias,
        down_proj_bias=down_proj_bias,
    )


# --- the reference, one loop over experts --------------------------------------------------------


@torch.library.custom_op("moe_fast::expert_mlp", mutates_args=())
@without_autocast
def _expert_mlp_op(
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
    rows = new_rows(x, row_to_token.shape[0], x.shape[1])
    saved = x.new_empty(row_to_token.shape[0] if save else 0, up_proj.shape[1])
    offsets = expert_offsets.tolist()
    for e, (first, last) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        if first == last:
            continue
        z = F.linear(x[row_to_token[first:last]], up_proj[e], _of(up_proj_bias, e))
        rows[first:last] = F.linear(activate(z, act, gated), down_proj[e], _of(down_proj_bias, e))
        if save:
            saved[first:last] = z
    saved[offsets[-1] :] = 0  # skipped slots: an op must not return uninitialised memory
    return combine(rows, slot_to_row, top_k_weights), saved


def _of(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]


def _expert_mlp_cpp(
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
    """kernels/csrc/cpu/expert_mlp.cpp, and expert_mlp_backward.cpp beside it."""
    return native.call(
        torch.ops.moe_fast_cpp.expert_mlp,
        *(x, up_proj, down_proj, up_proj_bias, down_proj_bias, top_k_weights),
        *(expert_offsets, row_to_token, row_to_slot, slot_to_row, act, gated, save),
    )


@_expert_mlp_op.register_fake
def fake(x, up_proj, *rest):
    """Shapes of the forward op's results, on every backend."""
    row_to_token, save = rest[5], rest[-1]
    saved_rows = row_to_token.shape[0] if save else 0
    return x.new_empty(x.shape), x.new_empty((saved_rows, up_proj.shape[1]))


@torch.library.custom_op("moe_fast::expert_mlp_backward", mutates_args=())
@without_autocast
def _expert_mlp_backward_op(
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
    # Experts without rows keep the zeros; absent biases get an empty gradient nobody reads.
    grad_up, grad_down = up_proj.new_zeros(up_proj.shape), down_proj.new_zeros(down_proj.shape)
    grad_up_bias = x.new_zeros(up_proj.shape[:2])
    grad_down_bias = x.new_zeros(down_proj.shape[:2])
    grad_rows = new_rows(x, row_to_token.shape[0], x.shape[1])
    grad_row_weights = top_k_weights.new_empty(row_to_token.shape[0])
    row_weights = top_k_weights.reshape(-1)[row_to_slot]
    offsets = expert_offsets.tolist()
    for e, (first, last) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        if first == last:
            continue
        here = slice(first, last)
        rows_x, grad_out = x[row_to_token[here]], grad_y[row_to_token[here]]
        z = saved[here] if saved.shape[0] else F.linear(rows_x, up_proj[e], _of(up_proj_bias, e))
        h = activate(z, act, gated)
        grad_h = grad_out @ down_proj[e]
        weight = row_weights[here, None]
        grad_row_weights[here] = (grad_h.to(weight.dtype) * h).sum(-1)
        if down_proj_bias is not None:
            grad_row_weights[here] += grad_out.to(weight.dtype) @ down_proj_bias[e].to(weight.dtype)
        grad_z = activate_backward((grad_h * weight).to(x.dtype), z, act, gated)
        grad_out = (grad_out * weight).to(x.dtype)
        grad_down[e], grad_down_bias[e] = grad_out.t() @ h, grad_out.sum(0)
        grad_up[e], grad_up_bias[e] = grad_z.t() @ rows_x, grad_z.sum(0)
        grad_rows[here] = grad_z @ up_proj[e]
    grad_weights = slot_values(grad_row_weights, slot_to_row, top_k_weights.shape)
    grad_x = combine(grad_rows, slot_to_row, torch.ones_like(top_k_weights))
    return grad_x, grad_up, grad_down, grad_up_bias, grad_down_bias, grad_weights


def _expert_mlp_cpp_backward(
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
    return native.call(
        torch.ops.moe_fast_cpp.expert_mlp_backward,
        *(grad_y, x, up_proj, down_proj, up_proj_bias, down_proj_bias, top_k_weights),
        *(expert_offsets, row_to_token, row_to_slot, slot_to_row, saved, act, gated),
    )


@_expert_mlp_backward_op.register_fake
def fake_backward(
    grad_y, x, up_proj, down_proj, up_proj_bias, down_proj_bias, top_k_weights, *rest
):
    """Shapes of the backward op's results, on every backend."""
    return (
        x.new_empty(x.shape),
        up_proj.new_empty(up_proj.shape),
        down_proj.new_empty(down_proj.shape),
        x.new_empty(up_proj.shape[:2]),
        x.new_empty(down_proj.shape[:2]),
        top_k_weights.new_empty(top_k_weights.shape),
    )


def save_for_backward(ctx, inputs, output):
    """Keep the op's tensors, and z where it was saved."""
    *tensors, act, gated, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.settings = (act, gated)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or autograd makes zeros as large as z for its gradient


def backward(op, ctx, grad_y, _):
    """The gradients of the forward op's inputs, by the backward op ``op``."""
    if grad_y is None:  # only z was asked for, which has no gradient
        return (None,) * 13
    tensors = ctx.saved_tensors  # read once: gradient checkpointing unpacks at each read
    up_bias, down_bias = tensors[3:5]
    grads = op(grad_y, *tensors, *ctx.settings)
    grad_x, grad_up, grad_down, grad_up_bias, grad_down_bias, grad_weights = grads
    return (
        grad_x,
        grad_up,
        grad_down,
        None if up_bias is None else grad_up_bias,
        None if down_bias is None else grad_down_bias,
        grad_weights,
        *[None] * 7,
    )


_expert_mlp_op.register_autograd(
    functools.partial(backward, _expert_mlp_backward_op), setup_context=save_for_backward
)
backends.register("expert_mlp", "torch", _expert_mlp_op)
_run_expert_mlp_cpp = register_op(
    "moe_fast::expert_mlp_cpp",
    _expert_mlp_cpp,
    fake,
    save_for_backward,
    functools.partial(
        backward,
        register_op("moe_fast::expert_mlp_cpp_backward", _expert_mlp_cpp_backward, fake_backward),
    ),
)
backends.register(
    "expert_mlp",
    "cpp",
    _run_expert_mlp_cpp,
    native.why_no_products,
    leaves_to_torch=(torch.float64,),
)
