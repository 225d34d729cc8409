"""What a portable file has in place of this package's own: see :mod:`moe_fast.models.portable`.

A class here goes before the one of the same name that the copied sources mean. Nothing imports
this module for its classes: it is read.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from moe_fast.architectures import Architecture
from moe_fast.layers.encoder_layers import layer_class
from moe_fast.models.configuration import config_class
from moe_fast.models.domain_predictor import add_predictor, predicted_domain_ids
from moe_fast.models.modeling import model_class
from moe_fast.models.routing_inputs import build_routing, place_domain_tokens, resolve_ids
from moe_fast.ops.checks import INTEGER_DTYPES, autocast_to, check_dtype, compute_dtype
from moe_fast.ops.expert_linear.reference import _expert_linear
from moe_fast.ops.expert_mlp.reference import _expert_mlp
from moe_fast.ops.plan.reference import _plan
from moe_fast.ops.route import Routing
from moe_fast.ops.route.modes import resolve_weight_mode
from moe_fast.ops.route.reference import (
    _gradients,
    _route,
    _route_backward,
    _route_enforced,
    _save_for_backward,
)

# Where the copied sources look for classes: here.
configuration = sys.modules[__name__]
layers = sys.modules[__name__]


class Route(torch.autograd.Function):
    """The reference of ``route`` with its own gradient."""

    forward = staticmethod(_route)
    setup_context = staticmethod(_save_for_backward)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """See ``torch.autograd.Function``."""
        return _gradients(_route_backward, ctx, *grads)


class ops:
    """What the layers use of ``moe_fast.ops``: its references, for states [B, L, D]."""

    plan = staticmethod(_plan)

    @staticmethod
    def route(
        x: Tensor,
        router_weight: Tensor | None,
        num_experts_per_tok: int,
        *,
        mode: str,
        weight_mode: str = "auto",
        expert_ids: Tensor | None,
        token_mask: Tensor | None,
        cu_seqlens: None,
        num_experts: int,
    ) -> Routing:
        """As :func:`moe_fast.ops.route`."""
        tokens = x.flatten(0, 1)
        mask = None if token_mask is None else token_mask.reshape(-1)
        starts = torch.arange(x.shape[0] + 1, device=x.device) * x.shape[1]
        if expert_ids is None:
            weight_mode = resolve_weight_mode(mode, weight_mode, num_experts_per_tok)
            weights, logits, index, counts = Route.apply(
                tokens, router_weight, num_experts_per_tok, mode, weight_mode, mask, starts
            )
            return Routing(index, weights, logits, counts)
        check_dtype("expert_ids", expert_ids, INTEGER_DTYPES)
        if expert_ids.shape not in (x.shape[:1], x.shape[:2]):
            raise ValueError(
                f"expert_ids must have shape [B] = {list(x.shape[:1])} or [B, L] = "
                f"{list(x.shape[:2])}; got {list(expert_ids.shape)}."
            )
        ids, dtype = expert_ids.reshape(-1).to(torch.int64), compute_dtype(x.dtype)
        index, weights, counts = _route_enforced(
            ids, tokens.shape[0], starts, mask, num_experts, dtype
        )
        return Routing(index, weights, None, counts)

    @staticmethod
    def expert_mlp(*tensors: Any, act: str, gated: bool) -> Tensor:
        """As :func:`moe_fast.ops.expert_mlp`."""
        *experts, top_k_weights, plan = tensors
        return _expert_mlp(*autocast_to(*experts), top_k_weights, *plan, act, gated, False)[0]

    @staticmethod
    def expert_linear(*tensors: Any) -> Tensor:
        """As :func:`moe_fast.ops.expert_linear`."""
        *experts, top_k_weights, plan = tensors
        return _expert_linear(*autocast_to(*experts), top_k_weights, *plan)


class MoEConfigFields:
    """The configuration as ``config.json`` has it, unchecked: moe_fast has written it."""

    def domain_id(self, domain: str) -> int:
        """The id of a domain, given by its name."""
        if domain not in self.domains:
            raise ValueError(f"domain must be one of {self.domains}; got {domain!r}.")
        return self.domains.index(domain)


class MoEModelMixin(PreTrainedModel):
    """What stands before the dense model in the bases of a mixture."""

    architecture: Architecture
    moe_layer_class: type[nn.Module]
    moe_output_class: type[BaseModelOutput]
    supports_gradient_checkpointing = True

    def post_init(self) -> None:
        """Swap layers before transformers loads or initialises weights."""
        self.config.fused_output = False  # the same numbers, by several operations
        encoder_layers = self.get_submodule(self.architecture.layers)
        for i in self.config.moe_layers:
            encoder_layers[i] = self.moe_layer_class(self.config, i)
        add_predictor(self)
        super().post_init()

    def _moe_forward(
        self,
        dense_inputs: dict[str, Any],
        expert_ids: Tensor | None,
        domain: str | None,
        domain_ids: Tensor | None,
        output_router_logits: bool | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """Resolve the routing, run the dense model's forward, put the routing in the output."""
        if kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError("cu_seq_lens_q must be None: packed batches need moe_fast.")
        return_dict = kwargs.pop("return_dict", None)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        input_ids, attention_mask = dense_inputs["input_ids"], dense_inputs["attention_mask"]
        like = input_ids if input_ids is not None else dense_inputs["inputs_embeds"]
        if like is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds; got neither.")
        expert_ids, domain_ids = resolve_ids(
            self.config,
            like,
            like.shape[0],
            expert_ids=expert_ids,
            domain=domain,
            domain_ids=domain_ids,
            token_type_ids=dense_inputs.get("token_type_ids"),
            predict=lambda: predicted_domain_ids(self, input_ids, attention_mask, None),
        )
        dense_inputs["input_ids"] = place_domain_tokens(
            self.config, input_ids, domain_ids, attention_mask, None
        )
        outputs = super().forward(
            **dense_inputs,
            **kwargs,
            routing=build_routing(self.config, like, expert_ids, attention_mask, None, self.dtype),
            output_router_logits=output_router_logits,
            output_tokens_per_expert=output_router_logits,
            return_dict=True,
        )
        output = self.moe_output_class(**outputs)
        output.router_logits = output.router_logits or None
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return output if return_dict else output.to_tuple()


def define(architecture: Architecture) -> None:
    """Make the classes of an architecture's mixtures, here."""
    config_class(architecture)
    layer_class(architecture)
    model_class(architecture)
