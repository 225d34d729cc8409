"""A tiny SentenceTransformer made offline: a random BERT and a word-level tokenizer."""

import pytest

pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A saved dense SentenceTransformer, 32 tokens at most."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from tests.models.tiny import build

    path = tmp_path_factory.mktemp("dense")
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


@pytest.fixture
def dense(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(folder, device="cpu")
