"""Mixtures with a head: transformers' own head, its encoder a mixture.

``MoEBertForMaskedLM`` and its siblings, one for each entry of the table of architectures and each
head that its dense model has in transformers. Weights, losses and everything else of the head are
transformers'; what is added is the way of the routing through its forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from moe_fast import compat
from moe_fast.architectures import ARCHITECTURES, Architecture, make_class
from moe_fast.models import configuration, modeling
from moe_fast.models.modeling import MoEModelMixin, pooler_setting
from moe_fast.models.pretrained import MoEPreTrainedModel

# Said of a call in the forward's signature, as the bare model's says it.
_ROUTING = {
    "expert_ids": "Tensor | None",
    "domain": "str | None",
    "domain_ids": "Tensor | None",
    "output_router_logits": "bool | None",
}
# What the encoder alone is concerned with; some dense heads hand it on, some drop it.
_ENCODERS_OWN = (
    *_ROUTING,
    *("packed", "text_hash"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
)


@dataclass
class MoEMaskedLMOutput(MaskedLMOutput):
    """The dense output, plus each MoE layer's routing where it was asked for.

    Attributes:
        router_logits, tokens_per_expert: as in :class:`moe_fast.models.MoEModelOutput`.
    """

    router_logits: tuple[Tensor, ...] | None = None
    tokens_per_expert: tuple[Tensor, ...] | None = None


@dataclass
class MoESequenceClassifierOutput(SequenceClassifierOutput):
    """As :class:`MoEMaskedLMOutput`, of a classifier of texts."""

    router_logits: tuple[Tensor, ...] | None = None
    tokens_per_expert: tuple[Tensor, ...] | None = None


@dataclass
class MoETokenClassifierOutput(TokenClassifierOutput):
    """As :class:`MoEMaskedLMOutput`, of a classifier of tokens."""

    router_logits: tuple[Tensor, ...] | None = None
    tokens_per_expert: tuple[Tensor, ...] | None = None


_OUTPUTS: dict[str, Any] = {
    "ForMaskedLM": MoEMaskedLMOutput,
    "ForSequenceClassification": MoESequenceClassifierOutput,
    "ForTokenClassification": MoETokenClassifierOutput,
}


class RoutedEncoder:
    """The encoder as a dense head calls it: with this call's routing, and its output is kept.

    Args:
        encoder: the mixture.
        own: what the encoder is given besides, or instead of, what the head hands to it.
        cu_seqlens: [B + 1], of a packed batch whose states the head wants as texts, [B, L, D].
    """

    def __init__(self, encoder: MoEModelMixin, own: dict[str, Any], cu_seqlens: Tensor | None):
        self._encoder = encoder
        self._own = own
        self._cu_seqlens = cu_seqlens
        self.output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder's forward."""
        inputs = {**kwargs, **self._own, "return_dict": True}
        given = {name: value for name, value in inputs.items() if value is not None}
        self.output = self._encoder(*args, **given)
        if self._cu_seqlens is not None:
            states = self.output.last_hidden_state[0].split(self._cu_seqlens.diff().tolist())
            self.output.last_hidden_state = pad_sequence(states, batch_first=True)
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)


class HeadView:
    """A mixture with a head as its dense forward sees it: another object stands for its encoder."""

    def __init__(self, model: MoEHeadModel, encoder: RoutedEncoder):
        self._model = model
        setattr(self, model.base_model_prefix, encoder)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class MoEHeadModel(MoEPreTrainedModel):
    """What all mixtures with a head share; stands before the dense model in their bases.

    Forward takes the arguments of the dense model with this head and, as
    :meth:`moe_fast.models.modeling.MoEModel.forward`, ``expert_ids``, ``domain``, ``domain_ids``
    and ``output_router_logits``; it returns the dense output, with ``router_logits`` and
    ``tokens_per_expert`` where they were asked for. The loss of ``labels`` is the dense model's:
    losses of the router are the caller's to add. Domain tokens lie behind the vocabulary, in the
    embeddings and in what predicts words: logits have ``config.vocab_size`` columns.
    """

    dense_head: type[PreTrainedModel]
    moe_model_class: type[MoEModelMixin]
    moe_output_class: type[Any]

    @compat.overrides
    def post_init(self) -> None:
        """Put the mixture in the dense encoder's place before transformers initialises weights."""
        compat.check_overrides(type(self))
        encoder = self.moe_model_class(self.config, **pooler_setting(self.base_model))
        setattr(self, self.base_model_prefix, encoder)
        super().post_init()

    def _head_forward(self, inputs: dict[str, Any]) -> Any:
        """Run the dense head's forward on the mixture; ``inputs`` by name."""
        return_dict = inputs.pop("return_dict", None)
        own = {name: inputs.pop(name) for name in _ENCODERS_OWN if name in inputs}
        cu_seqlens = own.get("cu_seq_lens_q")
        if self.moe_head != "ForSequenceClassification":
            cu_seqlens = None  # heads of tokens take them as they lie
        if cu_seqlens is not None:
            own["attention_mask"] = inputs.get("attention_mask")
            inputs["attention_mask"] = _mask_of_texts(cu_seqlens)
        encoder = RoutedEncoder(self.base_model, own, cu_seqlens)
        dense = self.dense_head.forward(HeadView(self, encoder), **inputs, return_dict=True)
        output = self.moe_output_class(
            **dense,
            router_logits=encoder.output.router_logits,
            tokens_per_expert=encoder.output.tokens_per_expert,
        )
        return self._returned(output, return_dict)


def _mask_of_texts(cu_seqlens: Tensor) -> Tensor:
    """[B, L] int64, 1 for the tokens of each text of a packed batch; the encoder checks it."""
    lengths = cu_seqlens.reshape(-1).to(torch.int64).diff().clamp(min=0)
    longest = int(lengths.max()) if lengths.numel() else 0
    return (torch.arange(longest, device=lengths.device) < lengths[:, None]).to(torch.int64)


def head_classes(architecture: Architecture) -> Iterable[type[MoEHeadModel]]:
    """An architecture's mixtures with a head, made and put into this module."""
    return [_head_class(architecture, head) for head in architecture.heads]


def _head_class(architecture: Architecture, head: str) -> type[MoEHeadModel]:
    dense, name = architecture.heads[head], architecture.name
    signature = inspect.signature(dense.forward)
    order = tuple(signature.parameters)[1:]  # behind self

    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        if args:
            signature.bind(self, *args)  # or a TypeError
            named = dict(zip(order, args, strict=False))
            if twice := sorted(named.keys() & inputs.keys()):
                raise TypeError(f"forward() got multiple values for argument {twice[0]!r}")
            inputs |= named
        return self._head_forward(inputs)

    forward.__signature__ = _with_routing(signature)  # type: ignore[attr-defined]
    forward.__doc__ = f"As ``{dense.__name__}.forward``, routed: see :class:`MoEHeadModel`."
    made = make_class(
        __name__,
        f"MoE{name}{head}",
        f"``{dense.__name__}`` on a :class:`~moe_fast.models.MoE{name}Model`: see "
        ":class:`MoEHeadModel`.",
        (MoEHeadModel, dense),
        architecture=architecture,
        config_class=getattr(configuration, f"MoE{name}Config"),
        dense_head=dense,
        moe_head=head,
        moe_model_class=getattr(modeling, f"MoE{name}Model"),
        moe_output_class=_OUTPUTS[head],
        forward=forward,
    )
    made._no_split_modules = compat.unsplit_modules(dense, f"MoE{name}Layer")
    return made


def _with_routing(signature: inspect.Signature) -> inspect.Signature:
    """The signature, with our keywords before its ``**kwargs``."""
    theirs = list(signature.parameters.values())
    at = len(theirs) - (theirs[-1].kind is inspect.Parameter.VAR_KEYWORD)
    ours = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in _ROUTING.items()
    ]
    return signature.replace(parameters=[*theirs[:at], *ours, *theirs[at:]])


for _architecture in ARCHITECTURES:
    head_classes(_architecture)
