"""lora_mlp, lora_linear: experts that share one MLP and differ by low-rank pairs (LoRA).

Expert e has the weight W + s B[e] A[e] of a projection: W [O, I] is shared by all experts, and the
pair A [E, R, I], B [E, O, R] of rank R is its own. With the routing weights w of T tokens, each of
which visits K experts e = e(t, k):

    lora_linear   y_t = sum over k of w[t, k] * (W . x_t + b + s B[e] A[e] . x_t)
    lora_mlp      z_tk = W1 . x_t + b1 + s B1[e] A1[e] . x_t
                  y_t  = sum over k of w[t, k] * (W2 . h_tk + b2 + s B2[e] A2[e] . h_tk)

with h = act(z), plain or gated, as in :mod:`moe_fast.ops.expert_mlp`. What is linear is moved out
of the sum over k: W1 . x_t is computed once per token, and so is W2 . (sum over k of w h_tk). The
products with the pairs are grouped by expert (:func:`moe_fast.ops.expert_linear`), on whichever
backend that has; the gradients are those of its parts.

Source: Hu et al., arXiv 2106.09685.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fast.ops.activations import ACTIVATIONS, activate
from moe_fast.ops.checks import check_choice, check_shape
from moe_fast.ops.expert_linear import expert_linear
from moe_fast.ops.plan import RoutingPlan, plan_of_slots
from moe_fast.ops.plan_checks import check_plan


class LowRank(NamedTuple):
    """The pairs of a projection: expert e adds ``scale * b[e] @ a[e]`` to the shared weight.

    Attributes:
        a: [E, R, I].
        b: [E, O, R].
        scale: LoRA's alpha / R.
    """

    a: Tensor
    b: Tensor
    scale: float


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pair: LowRank,
    top_k_weights: Tensor,
    plan: RoutingPlan,
    *,
    backend: str | None = None,
) -> Tensor:
    """Compute a mixture of linear maps that share ``weight``; see the module for the mathematics.

    Args:
        x: [T, I].
        weight, bias: [O, I] and [O] or ``None``, shared by the experts.
        pair: of the experts, A [E, R, I] and B [E, O, R].
        top_k_weights: [T, K] float32 or float64, from :func:`moe_fast.ops.route`.
        plan: from :func:`moe_fast.ops.plan` of the same route.
        backend: see :func:`moe_fast.use_backend`.

    Returns:
        [T, O] in x's dtype (autocast's under autocast). Skipped slots contribute exactly 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
    """
    _check_pair("pair", pair, weight)
    x, weights = _without_skipped(x, top_k_weights, plan, pair)
    y = _once_per_token(F.linear(x, weight, bias), weights)
    return y + _summed(_low_rank(x, pair, weights, plan, backend), weights.shape[1])


def lora_mlp(
    x: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    up_pair: LowRank,
    down_pair: LowRank,
    top_k_weights: Tensor,
    plan: RoutingPlan,
    *,
    act: str = "gelu",
    gated: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Compute a mixture of MLPs that share both projections; see the module for the mathematics.

    Args:
        x: [T, D].
        up_proj, down_proj: [H, D] (gated: [2H, D], the activated half first) and [D, H].
        up_proj_bias, down_proj_bias: [H] (gated: [2H]) and [D], or ``None``.
        up_pair, down_pair: the experts' pairs for the two projections.
        top_k_weights, plan, backend: as in :func:`lora_linear`.
        act, gated: as in :func:`moe_fast.ops.expert_mlp`.

    Returns:
        [T, D] in x's dtype (autocast's under autocast). Skipped slots contribute exactly 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or names do not fit.
    """
    check_choice("act", act, ACTIVATIONS)
    _check_pair("up_pair", up_pair, up_proj)
    _check_pair("down_pair", down_pair, down_proj)
    x, weights = _without_skipped(x, top_k_weights, plan, up_pair)
    per_token = weights.shape[1]
    shared = F.linear(x, up_proj, up_proj_bias)
    own = _low_rank(x, up_pair, torch.ones_like(weights), plan, backend)
    z = shared[:, None] + own.view(-1, per_token, own.shape[1])  # [T, K, H or 2H]
    h = activate(z, act, gated)
    y = F.linear((h * weights[..., None]).sum(1).to(h.dtype), down_proj)
    if down_proj_bias is not None:
        y = y + _once_per_token(down_proj_bias.to(y.dtype), weights)
    own = _low_rank(h.flatten(0, 1), down_pair, weights, plan, backend)
    return y + _summed(own, per_token)


def _check_pair(name: str, pair: LowRank, weight: Tensor) -> None:
    """Raise ``ValueError`` unless the pairs fit the shared weight."""
    check_shape(f"{name}'s weight", weight, (None, None), "[O, I]")
    check_shape(f"{name}.a", pair.a, (None, None, weight.shape[1]), "[E, R, I]")
    wanted = (pair.a.shape[0], weight.shape[0], pair.a.shape[1])
    check_shape(f"{name}.b", pair.b, wanted, "[E, O, R]")


def _without_skipped(
    x: Tensor, top_k_weights: Tensor, plan: RoutingPlan, pair: LowRank
) -> tuple[Tensor, Tensor]:
    """Set the weights of skipped slots to 0, and the tokens all of whose slots are skipped.

    The shared products do not see the plan, and must not spread what padding holds.
    """
    check_plan(x, top_k_weights, plan, pair.a.shape[0])
    skipped = (plan.slot_to_row < 0).view(top_k_weights.shape)
    x = x.masked_fill(skipped.all(1, keepdim=True), 0)
    return x, top_k_weights.masked_fill(skipped, 0)


def _once_per_token(y: Tensor, weights: Tensor) -> Tensor:
    """Multiply by the sum of a token's weights, [T, 1]; rounded to y's dtype at the end."""
    return (y * weights.sum(1, keepdim=True)).to(y.dtype)


def _low_rank(
    x: Tensor, pair: LowRank, weights: Tensor, plan: RoutingPlan, backend: str | None
) -> Tensor:
    """Compute ``w * s B[e] A[e] . x`` of every slot, [T * K, O].

    Args:
        x: [T, I], or [T * K, I], where the slots of a token differ.
        pair: see :class:`LowRank`.
        weights: [T, K].
        plan: of the tokens.
        backend: of the grouped products.
    """
    tokens, per_token = weights.shape
    slots = plan_of_slots(plan, per_token)
    if x.shape[0] != tokens * per_token:
        x = x.repeat_interleave(per_token, 0)
    ones = torch.ones_like(weights).view(-1, 1)
    inner = expert_linear(x, pair.a, None, ones, slots, backend=backend) * pair.scale
    return expert_linear(inner, pair.b, None, weights.view(-1, 1), slots, backend=backend)


def _summed(per_slot: Tensor, per_token: int) -> Tensor:
    """The sum over each token's slots: [T * K, O] to [T, O]."""
    if per_token == 1:
        return per_slot
    return per_slot.view(-1, per_token, per_slot.shape[1]).sum(1)
