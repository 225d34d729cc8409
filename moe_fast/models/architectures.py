"""The supported architectures: each dense class, its mixture, and how their weights correspond."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from moe_fast.models.configuration import (
    MoEBertConfig,
    MoEConfigFields,
    MoEModernBertConfig,
    MoERobertaConfig,
    MoEXLMRobertaConfig,
)
from moe_fast.models.modeling import (
    MoEBertModel,
    MoEModelMixin,
    MoEModernBertModel,
    MoERobertaModel,
    MoEXLMRobertaModel,
)

_POST_NORM_NAMES = {
    "intermediate.dense.weight": "mlp.up_proj",
    "intermediate.dense.bias": "mlp.up_proj_bias",
    "output.dense.weight": "mlp.down_proj",
    "output.dense.bias": "mlp.down_proj_bias",
}
_MODERNBERT_NAMES = {
    "mlp.Wi.weight": "mlp.gate_up_proj",
    "mlp.Wi.bias": "mlp.gate_up_proj_bias",
    "mlp.Wo.weight": "mlp.down_proj",
    "mlp.Wo.bias": "mlp.down_proj_bias",
}


@dataclass(frozen=True)
class Architecture:
    """One dense architecture and its mixture.

    Attributes:
        dense_config, dense_model: transformers' classes.
        moe_config, moe_model: ours.
        layer_prefix: where layer i's weights are in a state dict, for example "encoder.layer.".
        mlp_names: names within a layer, dense -> mixture; all other names are the same.
    """

    dense_config: type[PreTrainedConfig]
    dense_model: type[PreTrainedModel]
    moe_config: type[MoEConfigFields]
    moe_model: type[MoEModelMixin]
    layer_prefix: str
    mlp_names: dict[str, str]

    def build_dense(self, config: Any, like: PreTrainedModel) -> PreTrainedModel:
        """A dense model with (or without) a pooler, as ``like`` has."""
        return self.dense_model(config, **_pooler(like))

    def build_moe(self, config: Any, like: PreTrainedModel) -> MoEModelMixin:
        """A mixture with (or without) a pooler, as ``like`` has."""
        return self.moe_model(config, **_pooler(like))

    def split(self, name: str) -> tuple[int, str] | None:
        """(layer index, name within the layer) of a state-dict name, ``None`` outside layers."""
        if not name.startswith(self.layer_prefix):
            return None
        index, _, rest = name.removeprefix(self.layer_prefix).partition(".")
        return int(index), rest


def _pooler(like: PreTrainedModel) -> dict[str, bool]:
    return {"add_pooling_layer": like.pooler is not None} if hasattr(like, "pooler") else {}


ARCHITECTURES = (
    Architecture(
        BertConfig, BertModel, MoEBertConfig, MoEBertModel, "encoder.layer.", _POST_NORM_NAMES
    ),
    Architecture(
        RobertaConfig,
        RobertaModel,
        MoERobertaConfig,
        MoERobertaModel,
        "encoder.layer.",
        _POST_NORM_NAMES,
    ),
    Architecture(
        XLMRobertaConfig,
        XLMRobertaModel,
        MoEXLMRobertaConfig,
        MoEXLMRobertaModel,
        "encoder.layer.",
        _POST_NORM_NAMES,
    ),
    Architecture(
        ModernBertConfig,
        ModernBertModel,
        MoEModernBertConfig,
        MoEModernBertModel,
        "layers.",
        _MODERNBERT_NAMES,
    ),
)


def architecture_of(model: Any) -> Architecture:
    """The architecture of a dense model or a mixture.

    Raises:
        TypeError: for anything else; the message lists what is supported.
    """
    for architecture in ARCHITECTURES:
        if type(model) in (architecture.dense_model, architecture.moe_model):
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
