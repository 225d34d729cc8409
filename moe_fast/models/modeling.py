"""The models: transformers' encoders with mixture-of-experts layers, for AutoModel."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
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
from moe_fast.files import atomic_folder
from moe_fast.layers import MoEMLP, MoERouter, RouterOutput
from moe_fast.layers.attention import packed_attention
from moe_fast.models import configuration
from moe_fast.models.checkpoint_files import check_checkpoint
from moe_fast.models.loading import naming
from moe_fast.models.model_card import has_foreign_card, write_model_card
from moe_fast.models.packing import pack_inputs, packing_of, unpack_outputs
from moe_fast.models.portable import set_portable
from moe_fast.models.routing_inputs import build_routing, place_domain_tokens, resolve_ids
from moe_fast.models.saving import check_no_adapter, replaced_files
from moe_fast.models.strict import check_loading_info
from moe_fast.ops.checks import check_shape, compute_dtype
from moe_fast.version import __version__

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


class MoEModelMixin(PreTrainedModel):
    """What all the models share; stands before the dense model in their bases."""

    architecture: Architecture
    moe_layer_class: type[nn.Module]
    moe_output_class: type[BaseModelOutput]
    is_moe_fast_model = True
    supports_gradient_checkpointing = True  # our layers do, whatever the dense model's say

    @property
    def encoder_layers(self) -> nn.ModuleList:
        """The encoder's layers, dense and MoE ones."""
        return self.get_submodule(self.architecture.layers)

    def moe_mlps(self) -> dict[int, MoEMLP]:
        """The MoE layers' mixtures, by layer index."""
        mlps = {i: self.encoder_layers[i].mlp for i in self.config.moe_layers}
        # PEFT wraps a module whose parameters it adapts.
        return {
            i: mlp.get_base_layer() if hasattr(mlp, "get_base_layer") else mlp
            for i, mlp in mlps.items()
        }

    @compat.overrides
    def post_init(self) -> None:
        """Swap layers before transformers initialises weights and reads the modules' plans."""
        compat.check_overrides(type(self))
        self.config.check()  # fields may have been set since the configuration was made
        for i in self.config.moe_layers:
            self.encoder_layers[i] = self.moe_layer_class(self.config, i)
        super().post_init()

    @compat.overrides
    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if not isinstance(module, (MoEMLP, MoERouter)):
            return
        init = compat.initialization()
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("_bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)

    def num_parameters(
        self,
        only_trainable: bool = False,
        exclude_embeddings: bool = False,
        only_active: bool = False,
    ) -> int:
        """Number of parameters, as transformers counts them.

        Args:
            only_active: leave out the experts that a token does not visit: K of E count.
        """
        total = super().num_parameters(only_trainable, exclude_embeddings)
        if not only_active:
            return total
        idle = 0
        for mlp in self.moe_mlps().values():
            experts = (
                p for _, p in mlp.expert_parameters() if p.requires_grad or not only_trainable
            )
            idle += sum(p[0].numel() for p in experts) * (mlp.num_experts - mlp.num_experts_per_tok)
        return total - idle

    @classmethod
    @compat.overrides
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but strict: nothing is left to a random initialisation.

        Raises:
            ValueError: for a damaged file, which the message names, and for weights that the
                checkpoint lacks (a pooler's alone may be missing, as some models are saved
                without one).
            FileNotFoundError: for a missing configuration, weights file or shard.
        """
        if isinstance(pretrained_model_name_or_path, (str, os.PathLike)):
            check_checkpoint(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        wanted = kwargs.pop("output_loading_info", False)
        with naming(pretrained_model_name_or_path):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        check_loading_info(info, model, pretrained_model_name_or_path)
        return (model, info) if wanted else model

    @compat.overrides
    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        *,
        portable: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """As transformers', but whole or not at all, and with a model card.

        An old model in ``save_directory`` stays until the new one takes its place in one step;
        files of others, and a ``README.md`` that somebody else wrote, are kept: see
        :func:`moe_fast.files.atomic_folder`. With ``distributed_checkpoint=True``, where every
        process writes files of its own, the files are written in place.

        Args:
            portable: ``True``: write a file of code, too, with which ``trust_remote_code=True``
                loads the folder where moe_fast is not installed; this save and the next ones do,
                also of the model that is loaded from there. ``False``: no longer.

        Raises:
            ValueError: for adapters that ``peft.get_peft_model`` put in, which its ``PeftModel``
                saves: a folder with their wrapped weights could not be loaded. For what cannot be
                portable: encoders that are not transformers', and adapters alone.
        """
        if not compat.saves_adapter_alone(self):
            check_no_adapter(self)
        set_portable(self, portable)
        self.config.moe_fast_version = __version__
        if not is_main_process or kwargs.get("distributed_checkpoint"):
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
            return
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).resolve().name)
        replaced = replaced_files(self, kwargs.get("variant"))
        with atomic_folder(save_directory, replaces=replaced) as temporary:
            with compat.adapter_methods():
                super().save_pretrained(str(temporary), is_main_process=True, **kwargs)
            if not has_foreign_card(save_directory):
                write_model_card(self, temporary)

    @compat.overrides
    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As transformers', but refused on a mixture that has not been saved and loaded.

        An adapter is saved alone, with the place of its base, from which loading it starts.
        """
        if not self.name_or_path:
            raise ValueError(
                "add_adapter needs a mixture loaded from where it was saved, since an adapter is "
                "saved as a reference to its base; this one was made in memory. Save it with "
                "save_pretrained, load it, and add the adapter to that."
            )
        with compat.adapter_methods():
            super().add_adapter(*args, **kwargs)

    @compat.overrides
    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; where it refuses the installed peft, the error says what works."""
        with compat.adapter_methods():
            return super().load_adapter(*args, **kwargs)

    @compat.overrides
    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but refused where domain tokens are the vocabulary's last rows."""
        if self.config.domain_token_ids and (args or kwargs):
            raise ValueError(
                "resize_token_embeddings would cut off or move the domain tokens (ids "
                f"{self.config.domain_token_ids}). Add tokens to the dense model and its tokenizer "
                "before upcycling."
            )
        return super().resize_token_embeddings(*args, **kwargs)

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
        )
        dense_inputs["input_ids"] = place_domain_tokens(
            self.config, input_ids, domain_ids, attention_mask, cu_seqlens
        )
        if packing is not None:
            expert_ids = pack_inputs(self, packing, dense_inputs, expert_ids)
            kwargs.update(packing.attention_kwargs)
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
            unpack_outputs(self, packing, output)
        return self._returned(output, return_dict)

    def _runs_again(self) -> bool:
        """Whether the backward computes the layers' forward a second time."""
        layers = self.encoder_layers if self.training and torch.is_grad_enabled() else ()
        return any(getattr(layer, "gradient_checkpointing", False) for layer in layers)

    def _returned(self, output: BaseModelOutput, return_dict: bool | None) -> Any:
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return output if return_dict else output.to_tuple()

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
            domain: one name for the whole batch; excludes ``expert_ids`` and ``domain_ids``.
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
