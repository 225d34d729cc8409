"""The table of encoders that can be upcycled: one entry each."""

from __future__ import annotations

from typing import Any

from transformers import BertModel, ModernBertModel, RobertaModel, XLMRobertaModel
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.modernbert.modeling_modernbert import ModernBertEncoderLayer
from transformers.models.roberta.modeling_roberta import RobertaLayer
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaLayer

from moe_fast.architectures.architecture import Architecture

# What BERT's descendants have in common.
_BERT: dict[str, Any] = {
    "layers": "encoder.layer",
    "up": ("intermediate.dense",),
    "down": "output.dense",
    "mlp": ("intermediate", "output.dense"),
    "norm": "output.LayerNorm",
    "dropout": "output.dropout",
    "attention": "attention",
}

ARCHITECTURES = [
    Architecture(dense_model=BertModel, dense_layer=BertLayer, **_BERT),
    Architecture(
        dense_model=RobertaModel, dense_layer=RobertaLayer, padding_id="pad_token_id", **_BERT
    ),
    Architecture(
        dense_model=XLMRobertaModel,
        dense_layer=XLMRobertaLayer,
        padding_id="pad_token_id",
        **_BERT,
    ),
    Architecture(
        dense_model=ModernBertModel,
        dense_layer=ModernBertEncoderLayer,
        layers="layers",
        up=("mlp.Wi",),
        down="mlp.Wo",
        gated=True,
        mlp=("mlp",),
        activation="hidden_activation",
        bias="mlp_bias",
        pre_norm=True,
        norm="mlp_norm",
        attention="attn",
        attention_norm="attn_norm",
    ),
]
