"""RoutingInfo: all inputs that a layer needs to route a batch, in one object.

A layer cannot find padding in its attention mask (which may be ``None``, 4-D bool or 4-D float).
Therefore the model makes a RoutingInfo from the 2-D mask and passes it to every layer, as
``routing=``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from moe_fast import ops

# Keywords of a layer's forward that are for routing and must not be passed to the attention.
_KEYWORDS = ("expert_ids", "token_mask", "cu_seqlens", "routing")
_OUTPUT_FLAGS = ("output_router_logits", "output_tokens_per_expert")


@dataclass(frozen=True)
class RoutingInfo:
    """The inputs of the routing of a batch, as :func:`moe_fast.ops.route` takes them.

    Attributes:
        expert_ids: [B], [B, L] or [T]; enforced routing only, which sends texts to given experts.
        token_mask: [B, L] or [T] bool, True for real tokens; ``None``: all are real.
        cu_seqlens: [B + 1] for a packed batch, whose hidden states are [1, T, D] or [T, D].
        enforced: with enforced routing, the route and its plan (the order in which experts compute
            the tokens), which are made before the first layer and shared by all layers.
    """

    expert_ids: Tensor | None = None
    token_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    enforced: tuple[ops.Routing, ops.RoutingPlan] | None = None

    @classmethod
    def of(cls, routing: RoutingInfo | None, **parts: Any) -> RoutingInfo:
        """Return ``routing``, or one made of ``parts``; raise ``ValueError`` if both are given."""
        if routing is None:
            return cls(**parts)
        doubled = [name for name, value in parts.items() if value is not None]
        if doubled:
            raise ValueError(f"give routing or {', '.join(doubled)}, not both.")
        if not isinstance(routing, cls):
            names = ", ".join(f.name for f in fields(cls))
            raise TypeError(
                f"routing must be a RoutingInfo({names}); got {type(routing).__name__}."
            )
        return routing

    @classmethod
    def pop_from(cls, kwargs: dict[str, Any]) -> RoutingInfo:
        """Remove the routing keywords of a layer's forward from ``kwargs``, and return them."""
        for flag in _OUTPUT_FLAGS:
            kwargs.pop(flag, None)
        parts = {name: kwargs.pop(name, None) for name in _KEYWORDS}
        return cls.of(parts.pop("routing"), **parts)

    def with_shared_plan(self, num_experts: int, like: Tensor) -> RoutingInfo:
        """A copy with the enforced route and its plan, made once for all layers.

        Args:
            num_experts: E.
            like: hidden states [B, L, D], of which only shape, dtype and device are used.
        """
        route = self.route(like, None, 1, mode="enforced", num_experts=num_experts)
        plan = ops.plan(route.top_k_index, num_experts)
        return RoutingInfo(self.expert_ids, self.token_mask, self.cu_seqlens, (route, plan))

    def route(
        self, hidden_states: Tensor, weight: Tensor | None, num_experts_per_tok: int, **modes: Any
    ) -> ops.Routing:
        """Choose experts for this batch's tokens, with its expert ids, mask and sequence starts.

        Args:
            hidden_states: [B, L, D] or, packed (without padding), [T, D].
            weight: the router's weight [E, D]; ``None`` with enforced routing.
            num_experts_per_tok: K.
            modes: further arguments of :func:`moe_fast.ops.route`.

        Returns:
            The choices and their weights, as :func:`moe_fast.ops.route`.
        """
        mask = self.token_mask
        if self.cu_seqlens is not None:
            hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
            mask = None if mask is None else mask.reshape(-1)
        return ops.route(
            hidden_states,
            weight,
            num_experts_per_tok,
            expert_ids=self.expert_ids,
            token_mask=mask,
            cu_seqlens=self.cu_seqlens,
            **modes,
        )


def token_mask_of(attention_mask: Any) -> Tensor | None:
    """[B, L] bool, True for real tokens, from a model's 2-D attention mask.

    A 4-D mask, or ModernBERT's dictionary of masks, does not say which tokens are padding. The
    result is then ``None``: every token is real.
    """
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask.to(torch.bool)
    return None
