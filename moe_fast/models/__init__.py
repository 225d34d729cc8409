"""Configurations and models that transformers' AutoConfig and AutoModel load."""

from transformers import AutoConfig, AutoModel

from moe_fast.models.architectures import ARCHITECTURES
from moe_fast.models.configuration import (
    MoEBertConfig,
    MoEModernBertConfig,
    MoERobertaConfig,
    MoEXLMRobertaConfig,
)
from moe_fast.models.modeling import (
    MoEBertModel,
    MoEModelOutput,
    MoEModelOutputWithPooling,
    MoEModernBertModel,
    MoERobertaModel,
    MoEXLMRobertaModel,
)

for _architecture in ARCHITECTURES:
    _config = _architecture.moe_config
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _architecture.moe_model, exist_ok=True)

__all__ = [
    "MoEBertConfig",
    "MoEBertModel",
    "MoEModelOutput",
    "MoEModelOutputWithPooling",
    "MoEModernBertConfig",
    "MoEModernBertModel",
    "MoERobertaConfig",
    "MoERobertaModel",
    "MoEXLMRobertaConfig",
    "MoEXLMRobertaModel",
]
