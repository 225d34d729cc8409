"""MoEMultiHeadMLP: a mixture of experts over parts of tokens, each of which is routed apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_fast.layers.moe_mlp import MoEMLP, OutputBlock
from moe_fast.layers.routing_info import RoutingInfo
from moe_fast.ops.checks import check_count


class MoEMultiHeadMLP(MoEMLP):
    """A mixture whose experts see one head of a token at a time (multi-head mixture of experts).

    With n heads of size h = D // n, a token x [D] becomes n sub-tokens, the parts of
    ``head_in(x)`` [n * h]. Each is routed apart to K of E experts, MLPs of size h -> H // n -> h.
    The sub-tokens' sums are put side by side again, and the result is ``head_out`` of them.

    Everything else is as in :class:`MoEMLP`, of sub-tokens instead of tokens: with sentence-wise
    routing the mean is over all sub-tokens of a sentence, with enforced routing all sub-tokens of a
    text go to its expert. The router's logits are [T * n, E].

    Source: Hallee et al., arXiv 2401.15713, after Wu et al., arXiv 2404.15045.

    Args:
        hidden_size, intermediate_size: D and H, those of the dense MLP in whose place it stands.
        num_experts, num_experts_per_tok: E and K, of each sub-token.
        num_heads: n, at most D and H.
        weight_mode: as in :func:`moe_fast.ops.route`; "auto" is "probability" for a learned
            choice, the entries of the softmax over all experts, which do not sum to 1.
        hidden_act, gated, bias, routing: as in :class:`MoEMLP`.

    Parameters: those of a :class:`MoEMLP` of ``hidden_size`` h and ``intermediate_size`` H // n;
    ``head_in`` and ``head_out``, linear maps with weights [n * h, D] and [D, n * h], and biases.

    Raises:
        ValueError, TypeError: for settings that do not go together, naming the argument.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        num_experts_per_tok: int = 1,
        num_heads: int = 2,
        *,
        hidden_act: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        routing: str = "token_topk",
        weight_mode: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("hidden_size", hidden_size)
        check_count("intermediate_size", intermediate_size)
        check_heads(num_heads, hidden_size, intermediate_size)
        head_size = hidden_size // num_heads
        super().__init__(
            head_size,
            intermediate_size // num_heads,
            num_experts,
            num_experts_per_tok,
            hidden_act=hidden_act,
            gated=gated,
            bias=bias,
            routing=routing,
            weight_mode=head_weight_mode(routing, weight_mode),
            device=device,
            dtype=dtype,
        )
        self.num_heads = num_heads
        self.model_size = hidden_size
        width = num_heads * head_size
        self.head_in = nn.Linear(hidden_size, width, device=device, dtype=dtype)
        self.head_out = nn.Linear(width, hidden_size, device=device, dtype=dtype)

    @property
    def experts_per_token(self) -> int:
        """How many experts a token visits at most: each head may visit others."""
        return min(self.num_experts, self.num_heads * self.num_experts_per_tok)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        expert_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        routing: RoutingInfo | None = None,
        output_block: OutputBlock | None = None,
    ) -> Tensor:
        """Compute the block; arguments as :meth:`MoEMLP.forward`, but ``output_block`` is refused.

        Returns:
            A tensor in the shape and dtype of ``hidden_states``; padding gives the bias of
            ``head_out``.
        """
        if output_block is not None:
            raise ValueError(
                "output_block must be None in a multi-head block, whose last map stands between "
                "the experts and what is fused with them; got a value."
            )
        if hidden_states.shape[-1] != self.model_size:
            raise ValueError(
                f"hidden_states must end in hidden_size = {self.model_size}; "
                f"got shape {list(hidden_states.shape)}."
            )
        info = RoutingInfo.of(
            routing, expert_ids=expert_ids, token_mask=token_mask, cu_seqlens=cu_seqlens
        )
        *outer, length, _ = hidden_states.shape
        heads = self.head_in(hidden_states).view(*outer, length * self.num_heads, self.hidden_size)
        y = super().forward(heads, routing=self._of_heads(info, hidden_states))
        return self.head_out(y.view(*outer, length, self.head_out.in_features))

    def _of_heads(self, info: RoutingInfo, hidden_states: Tensor) -> RoutingInfo:
        """The routing of the sub-tokens, which stand in the order of their tokens."""
        n, ids, starts = self.num_heads, info.expert_ids, info.cu_seqlens
        mask = info.token_mask
        sentences = hidden_states.shape[0] if hidden_states.dim() == 3 else None
        if starts is not None:
            sentences = starts.shape[0] - 1
        if ids is not None and (ids.dim() == 2 or ids.shape[0] != sentences):  # one per token
            ids = ids.repeat_interleave(n, -1)
        return replace(
            info,
            expert_ids=ids,
            token_mask=None if mask is None else mask.repeat_interleave(n, -1),
            cu_seqlens=None if starts is None else starts * n,
            enforced=None,
        )

    def extra_repr(self) -> str:
        """The settings that ``print(module)`` shows."""
        return f"num_heads={self.num_heads}, {super().extra_repr()}"


def check_heads(
    num_heads: Any, hidden_size: int, intermediate_size: int, name: str = "num_heads"
) -> None:
    """Raise unless there is at least one entry of the token and of the hidden layer per head."""
    check_count(name, num_heads)
    if num_heads > min(hidden_size, intermediate_size):
        raise ValueError(
            f"{name} must be at most hidden_size = {hidden_size} and intermediate_size = "
            f"{intermediate_size}; got {num_heads}."
        )


def head_weight_mode(routing: str, weight_mode: str) -> str:
    """What "auto" means in a multi-head block: the choice's probabilities, as published."""
    learned = routing not in ("enforced", "dense")
    return "probability" if weight_mode == "auto" and learned else weight_mode
