"""Runs transformers' MoE models on moe_fast's ops: ``experts_implementation="moe_fast"``.

    model = AutoModel.from_pretrained(path, experts_implementation="moe_fast")
    model.set_experts_implementation("moe_fast")

``import moe_fast`` registers this name. The model keeps its router and its parameters; its experts
run on :func:`moe_fast.ops.expert_mlp`, on any backend. Some models have a gate function of their
own or an activation that the ops lack, or a norm after each expert. Then the two projections run on
:func:`moe_fast.ops.expert_linear`, and the model's own code runs between or after them.
docs/transformers.md lists the models of each kind.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from moe_fast import compat, ops
from moe_fast.ops.activations import ACTIVATIONS, ALPHA, LIMIT
from moe_fast.ops.checks import compute_dtype

NAME = "moe_fast"
# The ops' names of activations, by transformers' classes, or by the function itself (LFM2).
_ACTS: dict[Any, str] = {type(ACT2FN[name]): name for name in ACTIVATIONS if name in ACT2FN}
_ACTS |= {F.silu: "silu", F.relu: "relu"}


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute the experts of one layer; the signature is transformers'.

    Args:
        self: the layer's experts module, as ``use_experts_implementation`` describes it.
        hidden_states: [T, D].
        top_k_index: [T, K] int64; ids >= ``self.num_experts`` (expert parallelism) are skipped.
        top_k_weights: [T, K].

    Returns:
        [T, D] in the dtype of ``hidden_states``.
    """
    up, up_bias = _projection(self, "gate_up_proj" if self.has_gate else "up_proj")
    down, down_bias = _projection(self, "down_proj")
    # At least float32, and at least as wide as the rows, because the ops sum in the weights' dtype.
    wide = compute_dtype(hidden_states.dtype)
    weights = top_k_weights.to(wide)
    act = _fused_act(self)
    dtype = wide if compat.computes_in_float32(self) else None
    if act is None:
        y = _unfused(
            self, hidden_states, top_k_index, weights, (up, up_bias), (down, down_bias), dtype
        )
    else:
        if self.has_gate and not self.is_concatenated:
            up, up_bias = _halves_apart(up, up_bias)
        plan = ops.plan(top_k_index, self.num_experts)
        y = ops.expert_mlp(
            hidden_states,
            up,
            down,
            up_bias,
            down_bias,
            weights,
            plan,
            act=act,
            gated=self.has_gate,
            dtype=dtype,
        )
    return y.to(hidden_states.dtype)


def _projection(experts: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Return the weight as [E, out, in] (a view), and the bias [E, out] or ``None``."""
    weight = getattr(experts, name)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    return (weight.mT if experts.is_transposed else weight), bias


def _halves_apart(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return interleaved halves apart: the weight [E, 2, H, D], a view, and the bias [E, 2H]."""
    weight = weight.unflatten(1, (-1, 2)).transpose(1, 2)
    return weight, None if bias is None else bias.unflatten(1, (-1, 2)).mT.flatten(1)


def _fused_act(experts: Any) -> str | None:
    """Return the activation's name if ``expert_mlp`` can compute these experts; else ``None``."""
    if getattr(experts, "has_post_expert_norm", False):
        return None
    if experts.has_gate and not compat.has_usual_gate(experts):
        return "clamped_swiglu" if compat.clamped_gate(experts) == (ALPHA, LIMIT) else None
    if experts.has_gate and not experts.is_concatenated:
        return None  # the usual gate takes halves
    act = getattr(experts, "act_fn", None)
    return _ACTS.get(type(act)) or _ACTS.get(act)


def _unfused(
    experts: Any,
    x: Tensor,
    top_k_index: Tensor,
    weights: Tensor,
    up: tuple[Tensor, Tensor | None],
    down: tuple[Tensor, Tensor | None],
    dtype: torch.dtype | None,
) -> Tensor:
    """Compute every (token, slot) as a separate token, so that the model's gate gets rows."""
    if dtype is not None:
        x, up, down = x.to(dtype), _cast(up, dtype), _cast(down, dtype)
    num_tokens, k = top_k_index.shape
    plan = ops.plan(top_k_index.reshape(-1, 1), experts.num_experts)
    weights = weights.reshape(-1, 1)
    one = torch.ones_like(weights)
    z = ops.expert_linear(x.repeat_interleave(k, dim=0), *up, one, plan)
    h = compat.gate_of(experts)(z) if experts.has_gate else experts.act_fn(z)
    if getattr(experts, "has_post_expert_norm", False):
        rows = experts.post_expert_norm(ops.expert_linear(h, *down, one, plan))
        rows = rows * torch.where(top_k_index.reshape(-1, 1) < experts.num_experts, weights, 0)
    else:
        rows = ops.expert_linear(h, *down, weights, plan)
    return rows.view(num_tokens, k, -1).to(weights.dtype).sum(1)


def _cast(
    projection: tuple[Tensor, Tensor | None], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    weight, bias = projection
    return weight.to(dtype), None if bias is None else bias.to(dtype)


compat.register_experts(NAME, experts_forward)
