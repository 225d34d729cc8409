"""Small random dense models of every supported architecture."""

import torch
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
MODERNBERT = {
    "pad_token_id": 0,
    "bos_token_id": 4,
    "cls_token_id": 4,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "local_attention": 4,
}
CLS = 4
NAMES = ("bert", "roberta", "xlm_roberta", "modernbert")


def build(name: str, **changes):
    """A random dense model, dropout off; ``changes`` go into its configuration."""
    torch.manual_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config, model, sizes = {
        "bert": (BertConfig, BertModel, {**SIZES, **off}),
        "roberta": (RobertaConfig, RobertaModel, {**SIZES, **off}),
        "xlm_roberta": (XLMRobertaConfig, XLMRobertaModel, {**SIZES, **off}),
        "modernbert": (ModernBertConfig, ModernBertModel, {**SIZES, **MODERNBERT}),
    }[name]
    return model(config(**{**sizes, **changes})).eval()


def relative_error(got, want):
    """max |got - want| / max |want|."""
    return ((got - want).abs().max() / want.abs().max()).item()


def same_weights(a, b) -> bool:
    """Whether two models have the same names and bit for bit the same values."""
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
