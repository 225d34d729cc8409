"""Configurations and models that transformers' AutoConfig and AutoModel load, and conversions."""

from transformers import AutoConfig, AutoModel

from moe_fast.models.architectures import ARCHITECTURES
from moe_fast.models.configuration import (
    MoEBertConfig,
    MoEModernBertConfig,
    MoERobertaConfig,
    MoEXLMRobertaConfig,
)
from moe_fast.models.extract import extract_expert
from moe_fast.models.grow import add_expert, remove_expert
from moe_fast.models.importing import IMPORT_STYLES, KeyRule, import_checkpoint
from moe_fast.models.join import from_experts
from moe_fast.models.modeling import (
    MoEBertModel,
    MoEModelOutput,
    MoEModelOutputWithPooling,
    MoEModernBertModel,
    MoERobertaModel,
    MoEXLMRobertaModel,
)
from moe_fast.models.trainable import set_trainable
from moe_fast.models.upcycle import upcycle

for _architecture in ARCHITECTURES:
    _config = _architecture.moe_config
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _architecture.moe_model, exist_ok=True)

__all__ = [
    "IMPORT_STYLES",
    "KeyRule",
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
    "add_expert",
    "extract_expert",
    "from_experts",
    "import_checkpoint",
    "remove_expert",
    "set_trainable",
    "upcycle",
]
