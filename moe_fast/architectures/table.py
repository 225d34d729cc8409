"""The table of encoders that can be upcycled: one entry each."""

from __future__ import annotations

import importlib
from typing import Any

from moe_fast.architectures import own_forward
from moe_fast.architectures.architecture import Architecture


def _of(module: str, name: str, *, layer: str | None = None, **parts: Any) -> list[Architecture]:
    """The entry of one of transformers' encoders; empty if the installed release lacks it.

    Args:
        module: its folder in ``transformers.models``.
        name: the stem of the names of its classes.
        layer: the name of its layer's class, if that is not the stem and "Layer".
        parts: the fields of :class:`Architecture`.
    """
    try:
        found = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        model, layer_class = getattr(found, f"{name}Model"), getattr(found, layer or f"{name}Layer")
    except (ImportError, AttributeError):
        return []
    return [Architecture(dense_model=model, dense_layer=layer_class, **parts)]


# The fields that BERT and encoders derived from it have in common.
_BERT: dict[str, Any] = {
    "layers": "encoder.layer",
    "up": ("intermediate.dense",),
    "down": "output.dense",
    "mlp": ("intermediate", "output.dense"),
    "norm": "output.LayerNorm",
    "dropout": "output.dropout",
    "attention": "attention",
}
# The attention of those that normalise after its sum.
_BERT_ATTENTION: dict[str, Any] = {
    "projections": (
        *("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.output.dense",
    ),
    "projections_norm": "attention.output.LayerNorm",
}
_ROBERTA = {**_BERT, "padding_id": "pad_token_id"}
# Gate and up are two linear maps, as in Llama.
_GATE_AND_UP: dict[str, Any] = {
    "up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": "mlp.down_proj",
    "gated": True,
    "mlp": ("mlp",),
}
# Encoders with rotary positions that normalise after the sums.
_NOMIC: dict[str, Any] = {
    "layers": "layers",
    "attention": "self_attn",
    "attention_norm": "post_attention_layernorm",
    "attention_dropout": "post_attention_dropout",
    "projections": (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
    ),
    "norm": "post_mlp_layernorm",
    "dropout": "post_mlp_dropout",
}
_DEBERTA = {
    **_BERT,
    "tuple_output": True,
    "forward": own_forward.deberta,
    "not_packed": "its attention counts how far apart two places of the batch are",
}

ARCHITECTURES = [
    *_of("bert", "Bert", **_BERT, **_BERT_ATTENTION),
    *_of("roberta", "Roberta", **_ROBERTA, **_BERT_ATTENTION),
    *_of("xlm_roberta", "XLMRoberta", **_ROBERTA, **_BERT_ATTENTION),
    *_of("camembert", "Camembert", **_ROBERTA, **_BERT_ATTENTION),
    *_of("electra", "Electra", **_BERT, **_BERT_ATTENTION),
    *_of(
        "distilbert",
        "DistilBert",
        layer="TransformerBlock",
        layers="transformer.layer",
        up=("ffn.lin1",),
        down="ffn.lin2",
        mlp=("ffn.lin1", "ffn.lin2", "ffn.activation"),
        activation="activation",
        intermediate_size="hidden_dim",
        attention="attention",
        attention_norm="sa_layer_norm",
        projections=(
            *("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            "attention.out_lin",
        ),
        norm="output_layer_norm",
        dropout="ffn.dropout",
    ),
    *_of(
        "mpnet",
        "MPNet",
        **_BERT,
        padding_id=1,  # whatever the configuration says
        tuple_output=True,
        forward=own_forward.mpnet,
        not_packed="its attention counts how far apart two places of the batch are",
    ),
    *_of(
        "xlm_roberta_xl",
        "XLMRobertaXL",
        **{
            **_ROBERTA,
            "mlp": ("intermediate", "output"),
            "pre_norm": True,
            "norm": "LayerNorm",
            "dropout": None,
        },
    ),
    *_of(
        "deberta",
        "Deberta",
        **_DEBERTA,
        not_fused="have a norm of their own, in float32 whatever the model's dtype",
    ),
    *_of("deberta_v2", "DebertaV2", **_DEBERTA),
    *_of(
        "esm",
        "Esm",
        **{
            **_ROBERTA,
            "activation": "gelu",
            "pre_norm": True,
            "norm": "LayerNorm",
            "not_packed": "its embeddings are scaled by each text's share of mask tokens",
        },
    ),
    *_of("nomic_bert", "NomicBert", **_NOMIC, **_GATE_AND_UP, bias=False),
    *_of(
        "jina_embeddings_v3",
        "JinaEmbeddingsV3",
        **_NOMIC,
        up=("mlp.fc1",),
        down="mlp.fc2",
        mlp=("mlp",),
    ),
    *_of(
        "eurobert",
        "EuroBert",
        layer="EuroBertDecoderLayer",
        layers="layers",
        **_GATE_AND_UP,
        bias="mlp_bias",
        pre_norm=True,
        attention="self_attn",
        attention_norm="input_layernorm",
        norm="post_attention_layernorm",
    ),
    *_of(
        "modernbert",
        "ModernBert",
        layer="ModernBertEncoderLayer",
        layers="layers",
        up=("mlp.Wi",),
        down="mlp.Wo",
        gated=True,
        mlp=("mlp",),
        activation="hidden_activation",
        bias="mlp_bias",
        pre_norm=True,
        attention="attn",
        attention_norm="attn_norm",
        norm="mlp_norm",
    ),
]
