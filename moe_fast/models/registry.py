"""From a model to its architecture, and from an architecture to its models."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel, PreTrainedModel

from moe_fast.architectures import ARCHITECTURES, Architecture
from moe_fast.models import modeling
from moe_fast.models.modeling import MoEModelMixin


def moe_model(architecture: Architecture) -> type[MoEModelMixin]:
    """The class of an architecture's mixtures."""
    return getattr(modeling, f"MoE{architecture.name}Model")


def architecture_of(model: Any) -> Architecture:
    """The architecture of a dense model or a mixture.

    Raises:
        TypeError: for anything else; the message lists what is supported.
    """
    if isinstance(model, MoEModelMixin):
        return model.architecture
    for architecture in ARCHITECTURES:
        if type(model) is architecture.dense_model:
            return architecture
    supported = ", ".join(a.dense_model.__name__ for a in ARCHITECTURES)
    base = getattr(model, "base_model", None)
    hint = f" Pass its encoder, model.{model.base_model_prefix}." if _is_dense(base) else ""
    raise TypeError(
        f"model must be one of {supported}, a SentenceTransformer on one of them, or a mixture "
        f"made from one; got {type(model).__name__}.{hint}"
    )


def _is_dense(model: Any) -> bool:
    return any(type(model) is a.dense_model for a in ARCHITECTURES)


def build_dense(config: Any, like: PreTrainedModel) -> PreTrainedModel:
    """A dense model with (or without) a pooler, as the dense model or mixture ``like`` has."""
    return architecture_of(like).dense_model(config, **_pooler(like))


def build_moe(config: Any, like: PreTrainedModel) -> MoEModelMixin:
    """A mixture with (or without) a pooler, as the dense model or mixture ``like`` has."""
    return moe_model(architecture_of(like))(config, **_pooler(like))


def _pooler(like: PreTrainedModel) -> dict[str, bool]:
    return {"add_pooling_layer": like.pooler is not None} if hasattr(like, "pooler") else {}


for _architecture in ARCHITECTURES:
    _model = moe_model(_architecture)
    AutoConfig.register(_architecture.model_type, _model.config_class, exist_ok=True)
    AutoModel.register(_model.config_class, _model, exist_ok=True)
