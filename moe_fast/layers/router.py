"""MoERouter: the linear map of a router; a module, so that hooks can record its choices."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_fast.layers.routing_info import RoutingInfo


class RouterOutput(NamedTuple):
    """The result of :class:`MoERouter`; shapes are those of :class:`moe_fast.ops.Routing`.

    transformers' ``OutputRecorder`` reads the entries by position.
    """

    router_logits: Tensor | None
    top_k_weights: Tensor
    top_k_index: Tensor
    tokens_per_expert: Tensor


class MoERouter(nn.Module):
    """Chooses K of E experts for each token of its input.

    Args:
        dim: size of the input's last dimension.
        num_experts, num_experts_per_tok: E and K.
        mode, weight_mode: as in :func:`moe_fast.ops.route`. With ``"enforced"`` there is no
            weight, because the batch contains the expert ids.

    Attributes:
        weight: [E, dim], or ``None`` with enforced routing. It has the model's dtype; the
            product, the softmax and the choice are computed in at least float32.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        num_experts_per_tok: int,
        mode: str,
        weight_mode: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.mode = mode
        self.weight_mode = weight_mode
        weight = None
        if mode != "enforced":
            weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.register_parameter("weight", weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Linear`` does."""
        if self.weight is not None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, hidden_states: Tensor, info: RoutingInfo) -> RouterOutput:
        """Route ``hidden_states`` [B, L, dim] or [T, dim]."""
        if info.enforced is not None:
            routing = info.enforced[0]
        else:
            routing = info.route(
                hidden_states,
                self.weight,
                self.num_experts_per_tok,
                mode=self.mode,
                weight_mode=self.weight_mode,
                num_experts=self.num_experts,
            )
        return RouterOutput(
            routing.router_logits,
            routing.top_k_weights,
            routing.top_k_index,
            routing.tokens_per_expert,
        )

    def extra_repr(self) -> str:
        """The settings that ``print(module)`` shows."""
        return (
            f"num_experts={self.num_experts}, num_experts_per_tok={self.num_experts_per_tok}, "
            f"mode={self.mode}, weight_mode={self.weight_mode}"
        )
