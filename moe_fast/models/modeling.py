"""The models: transformers' encoders with mixture-of-experts layers, for AutoModel."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)

from moe_fast import compat, layers
from moe_fast.architectures import ARCHITECTURES, Architecture, make_class, setting
from moe_fast.layers import MoERouter, RouterOutput
from moe_fast.layers.attention import packed_attention
from moe_fast.layers.packed_inference import PackedInference
from moe_fast.models import configuration
from moe_fast.models.domain_predictor import add_predictor, predicted_domain_ids
from moe_fast.models.packing import pack_inputs, packing_of, unpack_outputs
from moe_fast.models.pretrained import MoEPreTrainedModel
from moe_fast.models.quantization import quantize_layers
from moe_fast.models.routing_inputs import build_routing, place_domain_tokens, resolve_ids
from moe_fast.ops.checks import check_shape, compute_dtype

_ROUTING_OUTPUTS = {
    name: (MoERouter, RouterOutput._fields.index(name))
    for name in ("router_logits", "tokens_per_expert")
}


@dataclass
class MoEModelOutput(BaseModelOutputWithCrossAttentions):
    """The dense output, plus each MoE layer's routing where it was asked for.

    Attributes:
        router_logits: tuple of [T, E], one per MoE layer; ``None`` with enforced routing.
        tokens_per_expert: tuple of [E] int64, one per MoE layer.
    """

    router_logits: tuple[Tensor, ...] | None = None
    tokens_per_expert: tuple[Tensor, ...] | None = None


@dataclass
class MoEModelOutputWithPooling(BaseModelOutputWithPoolingAndCrossAttentions):
    """As :class:`MoEModelOutput`, with the pooler's output."""

    router_logits: tuple[Tensor, ...] | None = None
    tokens_per_expert: tuple[Tensor, ...] | None = None


class MoEModelMixin(MoEPreTrainedModel):
    """What all bare models share; stands before the dense model in their bases."""

    moe_layer_class: type[nn.Module]
    moe_output_class: type[BaseModelOutput]

    @compat.overrides
    def post_init(self) -> None:
        """Swap layers before transformers initialises weights and reads the modules' plans."""
        compat.check_overrides(type(self))
        self.config.check()  # fields may have been set since the configuration was made
        self._check_layers()
        for i in self.config.moe_layers:
            self.encoder_layers[i] = self.moe_layer_class(self.config, i)
        add_predictor(self)
        if self.config.quantization is not None:
            quantize_layers(self.encoder_layers, self.config.quantization)
        super().post_init()

    def _check_layers(self) -> None:
        """Raise ``ValueError`` for an entry that names something else than the encoder's layers."""
        parts = self.architecture
        lists = {name: m for name, m in self.named_modules() if isinstance(m, nn.ModuleList)}
        found = lists.get(parts.layers)
        if found is None:
            raise ValueError(
                f"layers of the architecture {parts.name} must be the path of the list of layers "
                f"in {parts.dense_model.__name__} ({', '.join(lists)}); got {parts.layers!r}."
            )
        if other := [type(m).__name__ for m in found if not isinstance(m, parts.dense_layer)]:
            raise ValueError(
                f"dense_layer of the architecture {parts.name} must be the class of the modules in "
                f"{parts.layers!r}, {other[0]}; got {parts.dense_layer.__name__}."
            )

    def _moe_forward(
        self,
        dense_inputs: dict[str, Any],
        expert_ids: Tensor | None,
        domain: str | None,
        domain_ids: Tensor | None,
        output_router_logits: bool | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """Resolve the routing, run the dense model's forward, put the routing in the output.

        Among ``kwargs``, ``packed=True`` leaves the padding out of this one batch, whatever the
        configuration's attention is; not under gradient checkpointing, whose second forward comes
        when the choice is over, and would attend over all sentences as one, and not where texts
        cannot be packed.
        """
        can_pack = self.architecture.not_packed is None
        if kwargs.pop("packed", False) and can_pack and not self._runs_again():
            with packed_attention():
                return self._moe_forward(
                    dense_inputs, expert_ids, domain, domain_ids, output_router_logits, kwargs
                )
        kwargs.pop("text_hash", None)  # our collator's, for the losses
        return_dict = kwargs.pop("return_dict", None)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if output_router_logits:
            self._refuse_reentrant_checkpointing()
        input_ids, attention_mask = dense_inputs["input_ids"], dense_inputs["attention_mask"]
        like = input_ids if input_ids is not None else dense_inputs["inputs_embeds"]
        if like is None or (input_ids is not None and dense_inputs["inputs_embeds"] is not None):
            got = "neither" if like is None else "both"
            raise ValueError(f"give exactly one of input_ids and inputs_embeds; got {got}.")
        self._check_inputs(like, attention_mask)
        if like.shape[0] == 0:
            return self._empty_batch(like, return_dict, output_router_logits)
        packing = packing_of(self, like, attention_mask, kwargs)
        cu_seqlens = kwargs.get("cu_seq_lens_q")  # given: the caller has packed the batch
        if packing is not None and cu_seqlens is not None:
            self._check_length(packing.max_length)
        else:
            self._check_length(like.shape[1])
        expert_ids, domain_ids = resolve_ids(
            self.config,
            like,
            like.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
            expert_ids=expert_ids,
            domain=domain,
            domain_ids=domain_ids,
            token_type_ids=dense_inputs.get("token_type_ids"),
            predict=lambda: predicted_domain_ids(self, input_ids, attention_mask, cu_seqlens),
        )
        dense_inputs["input_ids"] = place_domain_tokens(
            self.config, input_ids, domain_ids, attention_mask, cu_seqlens
        )
        if packing is not None:
            expert_ids = pack_inputs(self, packing, dense_inputs, expert_ids)
            kwargs.update(packing.attention_kwargs)
            if not kwargs.get("output_attentions", self.config.output_attentions):
                inference = PackedInference.of_call(self.dtype, packing.cu_seqlens)
                kwargs |= {} if inference is None else {"packed_inference": inference}
        routing = build_routing(
            self.config,
            dense_inputs["input_ids"] if input_ids is not None else dense_inputs["inputs_embeds"],
            expert_ids,
            attention_mask if packing is None else None,
            None if packing is None else packing.cu_seqlens,
            self.dtype,
        )
        outputs = super().forward(
            **dense_inputs,
            **kwargs,
            routing=routing,
            output_router_logits=output_router_logits,
            output_tokens_per_expert=output_router_logits,
            return_dict=True,
        )
        output = self.moe_output_class(**outputs)
        output.router_logits = output.router_logits or None
        if output_router_logits and self.config.moe_layers:
            compat.check_recorded(output, "tokens_per_expert")
        if packing is not None:
            unpack_outputs(self, packing, output, heads=self.config.moe_heads or 1)
        return self._returned(output, return_dict)

    def _runs_again(self) -> bool:
        """Whether the backward computes the layers' forward a second time."""
        layers = self.encoder_layers if self.training and torch.is_grad_enabled() else ()
        return any(getattr(layer, "gradient_checkpointing", False) for layer in layers)

    def _empty_batch(
        self, like: Tensor, return_dict: bool | None, output_router_logits: bool
    ) -> Any:
        """Outputs of no texts, by shape: the dense attention cannot reshape an empty batch."""
        empty: dict[str, Any] = {
            "last_hidden_state": torch.empty(
                0, like.shape[1], self.config.hidden_size, dtype=self.dtype, device=like.device
            )
        }
        if getattr(self, "pooler", None) is not None:
            empty["pooler_output"] = empty["last_hidden_state"].new_empty(
                0, self.config.hidden_size
            )
        if output_router_logits:
            num_experts = self.config.num_experts
            layers = len(self.config.moe_layers)
            counts = torch.zeros(num_experts, dtype=torch.int64, device=like.device)
            empty["tokens_per_expert"] = (counts,) * layers
            if self.config.routing != "enforced":
                logits = torch.empty(
                    0, num_experts, dtype=compute_dtype(self.dtype), device=like.device
                )
                empty["router_logits"] = (logits,) * layers
        return self._returned(self.moe_output_class(**empty), return_dict)

    def _check_inputs(self, like: Tensor, attention_mask: Any) -> None:
        name = "inputs_embeds" if like.is_floating_point() else "input_ids"
        if like.dim() != (3 if like.is_floating_point() else 2):
            letters = "[B, L, D]" if like.is_floating_point() else "[B, L]"
            raise ValueError(f"{name} must be {letters}; got {list(like.shape)}.")
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            check_shape("attention_mask", attention_mask, tuple(like.shape[:2]), "[B, L]")

    def _check_length(self, length: int) -> None:
        allowed = self.config.max_position_embeddings
        padding = setting(self.config, self.architecture.padding_id)
        if padding is not None:
            allowed -= padding + 1  # positions start behind the padding's
        if length > allowed:
            raise ValueError(
                f"input_ids must hold at most {allowed} tokens per text (the model's positions); "
                f"got {length}. Truncate when tokenizing."
            )

    def _refuse_reentrant_checkpointing(self) -> None:
        if compat.checkpoints_reentrantly(self.encoder_layers[0]):
            raise ValueError(
                "output_router_logits needs gradient checkpointing with use_reentrant=False: the "
                "reentrant form gives router logits no gradient. Call "
                'gradient_checkpointing_enable({"use_reentrant": False}).'
            )


class OwnForward(PreTrainedModel):
    """Before a dense model that hands no keywords to its layers: runs it as its entry says."""

    @compat.capture_outputs
    def forward(self, **inputs: Any) -> BaseModelOutput:
        """The dense forward, with routing for the layers."""
        flags = ("output_router_logits", "output_tokens_per_expert")  # the decorator's
        known = {name: value for name, value in inputs.items() if name not in flags}
        return self.dense_forward(self, **known)


class MoEModel(MoEModelMixin):
    """The forward of encoders with token types."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        expert_ids: Tensor | None = None,
        domain: str | None = None,
        domain_ids: Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> MoEModelOutput | MoEModelOutputWithPooling:
        """The dense model's forward, routed.

        Args:
            expert_ids: [B] or [B, L] int64 in [0, E); enforced routing only. In a model with
                domains, [B] are domains too and place their tokens; [B, L] place none.
            domain: one name for the whole batch, or "auto": the one that the model's
                :class:`moe_fast.models.DomainPredictor` predicts for each text; excludes
                ``expert_ids`` and ``domain_ids``.
            domain_ids: [B] int64, indices into ``config.domains``. Without effect where routing
                is learned and the model has no domains.
            output_router_logits: also return ``router_logits`` and ``tokens_per_expert``;
                ``None``: as the config says.
        """
        dense_inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        return self._moe_forward(
            dense_inputs, expert_ids, domain, domain_ids, output_router_logits, kwargs
        )


class MoEModelWithoutTokenTypes(MoEModelMixin):
    """The forward of encoders that have no token types, such as ModernBERT."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        expert_ids: Tensor | None = None,
        domain: str | None = None,
        domain_ids: Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> MoEModelOutput | MoEModelOutputWithPooling:
        """The dense model's forward, routed; arguments as :meth:`MoEModel.forward`."""
        dense_inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        return self._moe_forward(
            dense_inputs, expert_ids, domain, domain_ids, output_router_logits, kwargs
        )


def pooler_setting(like: PreTrainedModel) -> dict[str, bool]:
    """The argument of an encoder's class that gives it a pooler, or none, as ``like`` has."""
    return {"add_pooling_layer": like.pooler is not None} if hasattr(like, "pooler") else {}


def model_class(architecture: Architecture) -> type[MoEModelMixin]:
    """The model of an architecture's mixture, made and put into this module."""
    dense, name = architecture.dense_model, architecture.name
    typed = "token_type_ids" in inspect.signature(dense.forward).parameters
    pooled = "add_pooling_layer" in inspect.signature(dense).parameters
    made = make_class(
        __name__,
        f"MoE{name}Model",
        f"``{dense.__name__}`` with mixtures of experts in ``config.moe_layers``: see "
        ":class:`MoEModel`.",
        (
            MoEModel if typed else MoEModelWithoutTokenTypes,
            *([OwnForward] if architecture.forward else []),
            dense,
        ),
        architecture=architecture,
        dense_forward=staticmethod(architecture.forward) if architecture.forward else None,
        config_class=getattr(configuration, f"MoE{name}Config"),
        moe_layer_class=getattr(layers, f"MoE{name}Layer"),
        moe_output_class=MoEModelOutputWithPooling if pooled else MoEModelOutput,
    )
    made._no_split_modules = compat.unsplit_modules(dense, f"MoE{name}Layer")
    made._can_record_outputs = compat.recorded_outputs(dense, **_ROUTING_OUTPUTS)
    return made


for _architecture in ARCHITECTURES:
    model_class(_architecture)
