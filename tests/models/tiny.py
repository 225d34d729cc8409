"""Small random dense models of every supported architecture."""

import torch
import transformers

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
BERT = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
CLS = 4
# The stem of the dense classes, and a small configuration without dropout.
DENSE = {
    "bert": ("Bert", BERT),
    "roberta": ("Roberta", BERT),
    "xlm_roberta": ("XLMRoberta", BERT),
    "modernbert": (
        "ModernBert",
        {
            **SIZES,
            "pad_token_id": 0,
            "bos_token_id": 4,
            "cls_token_id": 4,
            "eos_token_id": 2,
            "sep_token_id": 2,
            "local_attention": 4,
        },
    ),
    "camembert": ("Camembert", BERT),
    "electra": ("Electra", {**BERT, "embedding_size": 24}),
    "distilbert": (
        "DistilBert",
        {
            "vocab_size": 60,
            "dim": 32,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 40,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "mpnet": ("MPNet", BERT),
    "xlm_roberta_xl": ("XLMRobertaXL", BERT),
    "deberta": ("Deberta", {**DEBERTA, "type_vocab_size": 2}),
    # As the third version; the convolution behind the first layer is the second's.
    "deberta_v2": (
        "DebertaV2",
        {
            **DEBERTA,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
            "conv_kernel_size": 3,
        },
    ),
    "esm": (
        "Esm",
        {
            **BERT,
            "pad_token_id": 1,
            "mask_token_id": 3,
            "position_embedding_type": "rotary",
            "token_dropout": True,
        },
    ),
    "nomic_bert": ("NomicBert", BERT),
    "jina_embeddings_v3": ("JinaEmbeddingsV3", BERT),
    "eurobert": (
        "EuroBert",
        {
            **SIZES,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "bos_token_id": 4,
            "eos_token_id": 2,
            "mask_token_id": 3,
        },
    ),
}
NAMES = ("bert", "roberta", "xlm_roberta", "modernbert")  # the first, which all tests take
ENCODERS = tuple(n for n, (stem, _) in DENSE.items() if hasattr(transformers, f"{stem}Model"))


def build(name: str, **changes):
    """A random dense model, dropout off; ``changes`` go into its configuration."""
    torch.manual_seed(0)
    stem, sizes = DENSE[name]
    config = getattr(transformers, f"{stem}Config")(**{**sizes, **changes})
    return getattr(transformers, f"{stem}Model")(config).eval()


def build_head(name: str, head: str, **changes):
    """A random dense model with a head: 3 labels, no dropout, no weight left at 0."""
    stem, sizes = DENSE[name]
    settings = {"num_labels": 3, **sizes, **changes}
    if name == "distilbert":
        settings.setdefault("seq_classif_dropout", 0.0)
    torch.manual_seed(0)
    model = getattr(transformers, f"{stem}{head}")(
        getattr(transformers, f"{stem}Config")(**settings)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def relative_error(got, want):
    """max |got - want| / max |want|."""
    return ((got - want).abs().max() / want.abs().max()).item()


def same_weights(a, b) -> bool:
    """Whether two models have the same names and bit for bit the same values."""
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def save_sentence_transformer(path, name="bert") -> str:
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
    build(name).save_pretrained(path / "encoder")
    fast.save_pretrained(path / "encoder")
    encoder = Transformer(str(path / "encoder"), max_seq_length=32)
    modules = [encoder, Pooling(encoder.get_embedding_dimension(), pooling_mode="mean")]
    model = SentenceTransformer(
        modules=modules, device="cpu", prompts={"query": "w1 ", "document": "w2 "}
    )
    model.save_pretrained(str(path / "model"), create_model_card=False)
    return str(path / "model")
