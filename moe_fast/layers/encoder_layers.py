"""Drop-in encoder layers: transformers' layers, with the MLP replaced by a mixture of experts.

There is one class for each entry of the table of architectures, such as ``MoEBertLayer``. It has
the constructor, inputs and outputs of the class that it extends. Routing is passed in ``**kwargs``
(``expert_ids``, ``token_mask``, ``cu_seqlens``, or all of them in ``routing``) and removed before
the attention is called. A bare layer without ``token_mask`` treats every token as real.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_fast.architectures import ARCHITECTURES, Architecture, make_class, setting
from moe_fast.layers.moe_mlp import MoEMLP, OutputBlock
from moe_fast.layers.multi_head import MoEMultiHeadMLP
from moe_fast.layers.packed_inference import PackedInference
from moe_fast.layers.routing_info import RoutingInfo
from moe_fast.ops.activations import ACTIVATIONS

# Fields of the configuration that a mixture's layers need and dense layers do not.
_NEEDED = ("num_experts", "num_experts_per_tok", "routing", "weight_mode", "target")
# What a dense layer may have and these do not: what the configuration must say instead, and why.
_UNSUPPORTED = {
    "is_decoder": "False: moe_fast layers are encoders",
    "add_cross_attention": "False: moe_fast layers have no cross-attention",
    "chunk_size_feed_forward": "0: routing needs the whole batch at once",
    "mlp_dropout": "0: experts have no dropout between their projections",
}
# The fields of an entry that name modules of a dense layer.
_PARTS = (
    *("up", "down", "mlp", "norm", "dropout"),
    *("attention", "attention_norm", "attention_dropout"),
    *("projections", "projections_norm"),
)
# Keywords that decoders pass to their layers.
_DECODER_INPUTS = ("encoder_hidden_states", "cache", "past_key_values")


def _check_config(config: PreTrainedConfig) -> None:
    """Raise ``ValueError``, before anything is built, for settings that these layers lack."""
    name = type(config).__name__
    missing = [field for field in _NEEDED if not hasattr(config, field)]
    if missing:
        own = name if name.startswith("MoE") else f"MoE{name}"
        raise ValueError(
            f"config must have {', '.join(missing)}, as an {own} has; got {name}. Make one with "
            f"moe_fast.models.{own}(num_experts=4, ...) and the settings of yours, or a mixture "
            "of a trained model with moe_fast.upcycle(model, num_experts=4)."
        )
    for field, allowed in _UNSUPPORTED.items():
        value = getattr(config, field, None)
        if value:
            raise ValueError(f"config.{field} must be {allowed}; got {value}.")


def _check_parts(layer: nn.Module, parts: Architecture) -> None:
    """Raise ``ValueError`` for an entry that names modules that the dense layer lacks."""
    known = dict(layer.named_modules())
    named = {field: getattr(parts, field) for field in _PARTS}
    for field, value in named.items():
        for name in (value,) if isinstance(value, str) else value or ():
            if name not in known:
                raise ValueError(
                    f"{field} of the architecture {parts.name} must name modules of "
                    f"{parts.dense_layer.__name__} ({', '.join(n for n in known if n)}); got "
                    f"{name!r}."
                )


def _check_settings(config: PreTrainedConfig, parts: Architecture) -> None:
    """Raise ``ValueError`` for an entry whose settings this configuration does not have."""
    size, bias = setting(config, parts.intermediate_size), setting(config, parts.bias)
    padding = setting(config, parts.padding_id)
    act = setting(config, parts.activation)
    if act == parts.activation and act not in ACTIVATIONS:
        raise ValueError(
            f"activation of the architecture {parts.name} must be the name of a field of "
            f"{type(config).__name__}, or one of {', '.join(ACTIVATIONS)}; got {act!r}."
        )
    for field, given, fits, said in (
        ("intermediate_size", size, _is_count(size), "that holds a whole number above 0"),
        ("bias", bias, isinstance(bias, bool), "that holds True or False, or one of these"),
        ("padding_id", padding, padding is None or _is_count(padding, 0), "that holds an id"),
    ):
        if not fits:
            raise ValueError(
                f"{field} of the architecture {parts.name} must be the name of a field of "
                f"{type(config).__name__} {said}; got {getattr(parts, field)!r}"
                + (f", which holds {given!r}." if given != getattr(parts, field) else ".")
            )


def _is_count(value: Any, at_least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _check_weights(layer: nn.Module, config: PreTrainedConfig, parts: Architecture) -> None:
    """Raise ``ValueError`` for modules that an entry names, and that are not of its kind."""
    width, size = config.hidden_size, setting(config, parts.intermediate_size)
    rows = size * (2 if parts.gated else 1)
    has_bias = setting(config, parts.bias)
    for field, names, shape in (
        ("up", parts.up, [rows, width]),
        ("down", (parts.down,), [width, size]),
    ):
        maps = [layer.get_submodule(name) for name in names]
        found = [list(getattr(m, "weight", torch.empty(0)).shape) for m in maps]
        together = [sum(s[0] for s in found), *found[0][1:]]
        if together != shape:
            raise ValueError(
                f"{field} of the architecture {parts.name} must name linear maps with weights of "
                f"{shape} in all, [out, in]; got {', '.join(names)} with {found}."
            )
        if any((getattr(m, "bias", None) is not None) != has_bias for m in maps):
            raise ValueError(
                f"bias of the architecture {parts.name} must say whether {', '.join(names)} have "
                f"biases; got {parts.bias!r}, which is {has_bias}."
            )
    if parts.not_fused is None and not isinstance(layer.get_submodule(parts.norm), nn.LayerNorm):
        kind = type(layer.get_submodule(parts.norm)).__name__
        raise ValueError(
            f"not_fused of the architecture {parts.name} must say why its layers cannot have "
            f"fused_output, for norm ({parts.norm}) is no nn.LayerNorm but a {kind}; got None."
        )


class MoELayer(GradientCheckpointingLayer):
    """The base of all layers; it precedes the dense layer in their list of bases.

    With ``config.fused_output``, which may change at any time, the MLP also computes the dropout,
    the sum and the norm after it; forward hooks of these modules do not run then.
    """

    architecture: Architecture

    def __init__(self, config: PreTrainedConfig, layer_idx: int | None = None) -> None:
        _check_config(config)
        parts = self.architecture
        indexed = "layer_idx" in inspect.signature(parts.dense_layer).parameters
        super().__init__(config, *([layer_idx] if indexed else []))
        _check_settings(config, parts)
        _check_parts(self, parts)
        _check_weights(self, config, parts)
        self.config = config
        for name in parts.mlp:
            owner, _, leaf = name.rpartition(".")
            delattr(self.get_submodule(owner), leaf)
        self.mlp = _block(config, parts)

    def routed(self, x: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> Any:
        """Map hidden states [B, L, D] to [B, L, D]; for routing keywords see the module."""
        for name in _DECODER_INPUTS:
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} must be None: moe_fast layers are encoders; got a value.")
        kwargs.pop("encoder_attention_mask", None)
        routing = RoutingInfo.pop_from(kwargs)
        packed: PackedInference | None = kwargs.pop("packed_inference", None)
        parts = self.architecture
        if packed is not None:
            y = packed.run(self, x, attention_mask, routing, kwargs)
            if y is not None:
                return (y,) if parts.tuple_output else y
        norm = parts.attention_norm
        before = self._part(norm)(x) if norm is not None and parts.pre_norm else x
        output = self._part(parts.attention)(before, attention_mask=attention_mask, **kwargs)
        y, rest = (output, ()) if isinstance(output, Tensor) else (output[0], output[1:])
        x = y if norm is None else self._added(y, x, norm, parts.attention_dropout)
        x = self._mixed(x, routing)
        return (x, *rest) if parts.tuple_output else x

    def _mixed(self, x: Tensor, routing: RoutingInfo) -> Tensor:
        """The block of the layer that contains the experts."""
        parts = self.architecture
        if self.config.fused_output:
            return self.mlp(x, routing=routing, output_block=self._output_block(x))
        before = self._part(parts.norm)(x) if parts.pre_norm else x
        return self._added(self.mlp(before, routing=routing), x, parts.norm, parts.dropout)

    def _part(self, path: str) -> Any:
        part: Any = self
        for name in path.split("."):
            part = getattr(part, name)
        return part

    def _added(self, y: Tensor, residual: Tensor, norm: str, dropout: str | None) -> Tensor:
        """The sum at the end of a block, normalised if the layer is post-norm."""
        if dropout is not None:
            y = self._part(dropout)(y)
        return y + residual if self.architecture.pre_norm else self._part(norm)(y + residual)

    def _output_block(self, residual: Tensor) -> OutputBlock:
        """The dropout, sum and norm after the MLP, as an argument of the MLP that computes them."""
        parts = self.architecture
        norm = self._part(parts.norm)
        dropout = self._part(parts.dropout) if parts.dropout is not None else None
        p = dropout.p if dropout is not None and dropout.training else 0.0
        return OutputBlock(residual, norm.weight, norm.bias, norm.eps, p)


def _block(config: PreTrainedConfig, parts: Architecture) -> MoEMLP:
    """The block in place of the MLP, as the configuration says."""
    sizes = (
        config.hidden_size,
        setting(config, parts.intermediate_size),
        config.num_experts,
        config.num_experts_per_tok,
    )
    common = dict(
        hidden_act=setting(config, parts.activation),
        gated=parts.gated,
        bias=setting(config, parts.bias),
        routing=config.routing,
        weight_mode=config.weight_mode,
    )
    if config.moe_block == "multi_head":
        return MoEMultiHeadMLP(*sizes, config.moe_heads, **common)
    return MoEMLP(
        *sizes,
        **common,
        shared_bias=config.shared_bias,
        target=config.target,
        expert_form=config.expert_form,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
    )


def layer_class(architecture: Architecture) -> type[MoELayer]:
    """Make the layer class of an architecture's mixture, and add it to this module."""
    dense = architecture.dense_layer
    signature = inspect.signature(dense.forward)
    # Behind self, the hidden states and the mask.
    extra = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][3:]

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if args:
            signature.bind(self, hidden_states, attention_mask, *args, **kwargs)  # or a TypeError
            kwargs.update(zip(extra, args, strict=False))
        return self.routed(hidden_states, attention_mask, kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = MoELayer.routed.__doc__
    return make_class(
        __name__,
        f"MoE{architecture.name}Layer",
        f"transformers' ``{dense.__name__}`` with a :class:`~moe_fast.MoEMLP`; ``config`` as "
        f":class:`~moe_fast.models.MoE{architecture.name}Config`.",
        (MoELayer, dense),
        architecture=architecture,
        forward=forward,
    )


for _architecture in ARCHITECTURES:
    layer_class(_architecture)
