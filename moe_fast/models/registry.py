"""The encoders that are known: from a model to its architecture and back, and new ones."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel, PreTrainedModel

from moe_fast.architectures import ARCHITECTURES, Architecture
from moe_fast.layers.encoder_layers import layer_class
from moe_fast.models import modeling
from moe_fast.models.configuration import config_class
from moe_fast.models.modeling import MoEModelMixin, model_class

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
    """The class of an architecture's mixtures."""
    return getattr(modeling, f"MoE{architecture.name}Model")


def architecture_of(model: Any) -> Architecture:
    """The architecture of a dense model or a mixture.

    Raises:
        TypeError: for anything else; the message lists what is supported, and for another encoder
            of transformers says what to write.
    """
    if isinstance(model, MoEModelMixin):
        return model.architecture
    for architecture in ARCHITECTURES:
        if type(model) is architecture.dense_model:
            return architecture
    supported = ", ".join(a.dense_model.__name__ for a in ARCHITECTURES)
    base = getattr(model, "base_model", None)
    is_dense = any(type(base) is a.dense_model for a in ARCHITECTURES)
    hint = f" Pass its encoder, model.{model.base_model_prefix}." if is_dense else ""
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


def build_dense(config: Any, like: PreTrainedModel) -> PreTrainedModel:
    """A dense model with (or without) a pooler, as the dense model or mixture ``like`` has."""
    return architecture_of(like).dense_model(config, **_pooler(like))


def build_moe(config: Any, like: PreTrainedModel) -> MoEModelMixin:
    """A mixture with (or without) a pooler, as the dense model or mixture ``like`` has."""
    return moe_model(architecture_of(like))(config, **_pooler(like))


def _pooler(like: PreTrainedModel) -> dict[str, bool]:
    return {"add_pooling_layer": like.pooler is not None} if hasattr(like, "pooler") else {}


def register_architecture(
    dense_model: type[PreTrainedModel], dense_layer: type[Any], **parts: Any
) -> type[MoEModelMixin]:
    """Let mixtures be made of one more kind of encoder, by :func:`moe_fast.upcycle` and the others.

    Its mixtures' classes are made and registered with AutoConfig and AutoModel: a program that
    loads such a mixture registers the architecture first. The same call again changes nothing.

    Args:
        dense_model, dense_layer: the classes of the encoder and of its layers.
        parts: the other fields of :class:`moe_fast.architectures.Architecture`.

    Returns:
        The class of its mixtures.

    Raises:
        TypeError: for fields that are missing or that there are not, and for what is no model.
        ValueError: for an encoder that is known already, or whose mixtures' name or model type
            another one has. Names of modules are checked when a mixture is made.
    """
    if not (isinstance(dense_model, type) and issubclass(dense_model, PreTrainedModel)):
        raise TypeError(
            f"dense_model must be a class of a transformers model; got {dense_model!r}."
        )
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
    ARCHITECTURES.append(architecture)
    _register(architecture)
    return model


def _register(architecture: Architecture) -> None:
    model = moe_model(architecture)
    AutoConfig.register(architecture.model_type, model.config_class, exist_ok=True)
    AutoModel.register(model.config_class, model, exist_ok=True)


for _architecture in ARCHITECTURES:
    _register(_architecture)
