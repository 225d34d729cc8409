"""The encoders that are known: from a model to its architecture and back, and new ones."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from moe_fast.architectures import ARCHITECTURES, Architecture
from moe_fast.layers.encoder_layers import layer_class
from moe_fast.models import heads, modeling
from moe_fast.models.configuration import config_class
from moe_fast.models.heads import MoEHeadModel, head_classes
from moe_fast.models.modeling import MoEModelMixin, model_class, pooler_setting
from moe_fast.models.pretrained import MoEPreTrainedModel

_AUTO = {
    "": AutoModel,
    "ForMaskedLM": AutoModelForMaskedLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
}

_ENTRY = """\
    moe_fast.models.register_architecture(
        {model},
        ...,  # the class of its layers
        layers="encoder.layer",
        up=("intermediate.dense",),
        down="output.dense",
        mlp=("intermediate", "output.dense"),
        norm="output.LayerNorm",
        dropout="output.dropout",
        attention="attention",
    )
"""


def moe_model(architecture: Architecture) -> type[MoEModelMixin]:
    """The class of an architecture's bare mixtures."""
    return getattr(modeling, f"MoE{architecture.name}Model")


def moe_head(architecture: Architecture, head: str) -> type[MoEHeadModel]:
    """The class of an architecture's mixtures with a head, such as "ForMaskedLM"."""
    return getattr(heads, f"MoE{architecture.name}{head}")


def architecture_of(model: Any) -> Architecture:
    """The architecture of a dense model or a mixture, bare or with a head.

    Raises:
        TypeError: for anything else; the message lists what is supported, and for another encoder
            of transformers says what to write.
    """
    if isinstance(model, MoEPreTrainedModel):
        return model.architecture
    for architecture in ARCHITECTURES:
        if type(model) in (architecture.dense_model, *architecture.heads.values()):
            return architecture
    supported = ", ".join(a.dense_model.__name__ for a in ARCHITECTURES)
    base = getattr(model, "base_model", None)
    is_dense = any(type(base) is a.dense_model for a in ARCHITECTURES)
    hint = f" {_heads_there_are(model, base)}" if is_dense else ""
    kind = type(model).__name__
    if not hint and isinstance(model, PreTrainedModel):
        hint = (
            f" If {kind} is an encoder whose layers have an MLP, an entry makes it known; for one "
            f"built like BERT (others: docs/encoders.md):\n{_ENTRY.format(model=kind)}"
        )
    raise TypeError(
        f"model must be one of {supported}, a SentenceTransformer on one of them, or a mixture "
        f"made from one; got {kind}.{hint}"
    )


def _heads_there_are(model: PreTrainedModel, encoder: PreTrainedModel) -> str:
    heads = ", ".join(found.__name__ for found in architecture_of(encoder).heads.values())
    return (
        f"Pass its encoder, model.{model.base_model_prefix}, or a model with a head that mixtures "
        f"have, too: {heads or 'there is none for this encoder'}."
    )


def head_of(model: PreTrainedModel) -> str:
    """The head of a dense model or a mixture, such as "ForMaskedLM"; empty: it is bare."""
    if isinstance(model, MoEPreTrainedModel):
        return model.moe_head
    heads = architecture_of(model).heads
    return next((name for name, dense in heads.items() if type(model) is dense), "")


def build_dense(config: Any, like: PreTrainedModel) -> PreTrainedModel:
    """A dense model with the head, and with or without a pooler, as ``like``, dense or mixture."""
    architecture, head = architecture_of(like), head_of(like)
    if head:
        return architecture.heads[head](config)
    return architecture.dense_model(config, **pooler_setting(like))


def build_moe(config: Any, like: PreTrainedModel) -> MoEPreTrainedModel:
    """A mixture with the head, and with or without a pooler, as ``like``, dense or mixture."""
    architecture, head = architecture_of(like), head_of(like)
    if head:
        return moe_head(architecture, head)(config)
    return moe_model(architecture)(config, **pooler_setting(like))


def register_architecture(
    dense_model: type[PreTrainedModel], dense_layer: type[Any], **parts: Any
) -> type[MoEModelMixin]:
    """Let mixtures be made of one more kind of encoder, by :func:`moe_fast.upcycle` and the others.

    Its mixtures' classes are made and registered with AutoConfig and AutoModel, those with a head
    (for which the encoder's module has a dense model) with AutoModelForMaskedLM and the others: a
    program that loads such a mixture registers the architecture first. The same call again changes
    nothing.

    Args:
        dense_model, dense_layer: the classes of the encoder and of its layers.
        parts: the other fields of :class:`moe_fast.architectures.Architecture`.

    Returns:
        The class of its bare mixtures.

    Raises:
        TypeError: for fields that are missing, that there are not, or that are of another kind than
            they must be; the message names the field.
        ValueError: for fields that do not go together, for an encoder that is known already, and
            for one whose mixtures' name or model type another one has. Names of modules and of
            the configuration's fields are checked when a mixture is made.
    """
    architecture = Architecture(dense_model=dense_model, dense_layer=dense_layer, **parts)
    if architecture in ARCHITECTURES:
        return moe_model(architecture)
    for other in ARCHITECTURES:
        if architecture.name == other.name or architecture.model_type == other.model_type:
            raise ValueError(
                f"{dense_model.__name__} (model type {architecture.dense_config.model_type!r}) "
                f"must not be known already; there is an entry for {other.dense_model.__name__} "
                f"(model type {other.dense_config.model_type!r})."
            )
    layer_class(architecture)
    config_class(architecture)
    model = model_class(architecture)
    head_classes(architecture)
    ARCHITECTURES.append(architecture)
    _register(architecture)
    return model


def _register(architecture: Architecture) -> None:
    models = [moe_model(architecture), *(moe_head(architecture, h) for h in architecture.heads)]
    config = models[0].config_class
    AutoConfig.register(architecture.model_type, config, exist_ok=True)
    for model in models:
        _AUTO[model.moe_head].register(config, model, exist_ok=True)


for _architecture in ARCHITECTURES:
    _register(_architecture)
