"""Experts in plain operators, for exporters: comparisons, gathers and one product per expert.

The operations of :mod:`moe_fast.ops` are functions of compiled libraries, which no exporter can
translate. :class:`PlainMoEMLP` computes the same, for inference on padded batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_fast.layers.moe_mlp import MoEMLP, OutputBlock
from moe_fast.layers.routing_info import RoutingInfo
from moe_fast.ops.activations import activate
from moe_fast.ops.route.modes import SENTENCE_MODES, resolve_weight_mode


class PlainMoEMLP(MoEMLP):
    """In the place of a :class:`MoEMLP`, with whose weights it computes.

    In place of a plan it has the experts of all slots, [T, K], where E says that a slot is skipped.
    """

    def __init__(self, mlp: MoEMLP) -> None:
        nn.Module.__init__(self)
        for name in (
            *("hidden_size", "intermediate_size", "num_experts", "num_experts_per_tok"),
            *("hidden_act", "gated", "target"),
        ):
            setattr(self, name, getattr(mlp, name))
        for name in (self.up_name, "down_proj"):
            weight, bias = mlp.projection(name)
            if mlp.is_expert(name):
                biases = [None] * len(weight) if bias is None else list(bias)
                maps = [_linear(w, b) for w, b in zip(weight, biases, strict=True)]
                self.add_module(name, nn.ModuleList(maps))
            else:
                self.add_module(name, _linear(weight, bias))
        self.output_bias = mlp.output_bias
        self.router = mlp.router

    def reset_parameters(self) -> None:
        """Raise ``ValueError``: there is nothing to initialise."""
        raise ValueError("experts for an export cannot be initialised: they are made of others.")

    def _shared_linear(self, name: str, x: Tensor) -> Tensor:
        shared: nn.Linear = getattr(self, name)
        return shared(x)

    def _expert_linear(self, name: str, x: Tensor, weights: Any, plan: Any) -> Tensor:
        maps: Any = getattr(self, name)
        return self._mixture(x, weights, plan, lambda e, rows: maps[e](rows))

    def _expert_mlp(self, x: Tensor, weights: Any, plan: Any, block: OutputBlock | None) -> Tensor:
        assert block is None, "fused_output is switched off before an export"
        up: Any = getattr(self, self.up_name)
        down: Any = self.down_proj

        def expert(e: int, rows: Tensor) -> Tensor:
            return down[e](activate(up[e](rows), self.hidden_act, self.gated))

        return self._mixture(x, weights, plan, expert)

    def _mixture(
        self,
        x: Tensor,
        weights: Tensor | None,
        experts: Tensor,
        compute: Callable[[int, Tensor], Tensor],
    ) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            x: [T, D].
            weights: [T, K]; ``None``: all are 1.
            experts: [T, K] in [0, E].
            compute: maps an expert and some rows of x, perhaps none, to as many rows [., N].

        Returns:
            [T, N].
        """
        slots = experts.reshape(-1)
        k = self.num_experts_per_tok
        places = [(slots == e).nonzero().squeeze(1) for e in range(self.num_experts)]
        parts = [compute(e, x[place // k]) for e, place in enumerate(places)]
        rows = torch.cat([*parts, parts[0].new_zeros(1, parts[0].shape[1])])
        order = torch.cat(places)
        # The last row is that of skipped slots.
        skipped = torch.zeros_like(slots) + order.shape[0]
        row_of_slot = skipped.index_copy(0, order, torch.arange(order.shape[0]))
        y = rows[row_of_slot].view(*experts.shape, -1)
        return (y if weights is None else y * weights[..., None]).sum(1)

    def _route(self, x: Tensor, info: RoutingInfo) -> tuple[Any, Any]:
        """The routing weights [T, K], ``None`` where all are 1, and the experts [T, K]."""
        batch, length, _ = x.shape
        mask = info.token_mask
        k, mode = self.num_experts_per_tok, self.router.mode
        weights: Tensor | None = None
        if mode == "enforced":
            ids = info.expert_ids
            assert ids is not None
            index = (ids[:, None] if ids.dim() == 1 else ids)[..., None]
        else:
            logits = self._logits(x, mask)
            chosen, index = logits.topk(k, dim=-1)  # of equal ones the first, in ONNX
            kind = resolve_weight_mode(mode, self.router.weight_mode, k)
            if kind == "renormalize":
                weights = chosen.softmax(-1)
            elif kind == "probability":
                weights = logits.softmax(-1).gather(-1, index)
        index = index.expand(batch, length, k)
        if mask is not None:
            index = torch.where(mask[..., None], index, self.num_experts)
        if weights is not None:
            weights = weights.expand(batch, length, k).reshape(-1, k)
        return weights, index.reshape(-1, k)

    def _logits(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Of tokens [B, L, E], or the means of texts [B, 1, E]."""
        assert self.router.weight is not None
        real = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        logits = torch.where(real[..., None], x, 0) @ self.router.weight.t()
        if self.router.mode not in SENTENCE_MODES:
            return logits
        counts = real.sum(1).clamp(min=1).to(x.dtype)
        return (logits.sum(1) / counts[:, None])[:, None]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear map with this weight [N, K] and bias [N], which are not copied."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made


def to_plain_experts(module: nn.Module) -> None:
    """Replace all mixtures in a module by such ones, in place."""
    for name, child in list(module.named_children()):
        if type(child) is MoEMLP:
            setattr(module, name, PlainMoEMLP(child).train(child.training))
        else:
            to_plain_experts(child)
