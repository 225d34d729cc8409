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


def save_sentence_transformer(path) -> str:
    """A dense SentenceTransformer of 32 tokens at most, words w0 .. w53, saved under ``path``."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "x", "y", "[CLS]", "[SEP]", *(f"w{i}" for i in range(54))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 4), ("[SEP]", 5)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=40,
    )
    build("bert").save_pretrained(path / "encoder")
    fast.save_pretrained(path / "encoder")
    encoder = Transformer(str(path / "encoder"), max_seq_length=32)
    modules = [encoder, Pooling(encoder.get_embedding_dimension(), pooling_mode="mean")]
    model = SentenceTransformer(
        modules=modules, device="cpu", prompts={"query": "w1 ", "document": "w2 "}
    )
    model.save_pretrained(str(path / "model"), create_model_card=False)
    return str(path / "model")
