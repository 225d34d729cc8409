"""Tiny random encoders and datasets, made without a download."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

DOMAINS = ["fruit", "metal", "river"]
WORDS = {
    "fruit": ["apple", "pear", "plum", "fig", "melon", "grape", "lemon", "peach"],
    "metal": ["iron", "zinc", "tin", "gold", "lead", "copper", "nickel", "silver"],
    "river": ["rhine", "danube", "nile", "volga", "loire", "elbe", "tiber", "thames"],
}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MAX_LENGTH = 16


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = [word for domain in DOMAINS for word in WORDS[domain]]
    vocab = {token: i for i, token in enumerate(SPECIAL + words)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_LENGTH,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def make_dense(seed: int = 0, dropout: float = 0.0, layers: int = 2) -> SentenceTransformer:
    """A BERT of width 16 with mean pooling, on the CPU."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
    )
    with tempfile.TemporaryDirectory() as folder:
        BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        transformer = Transformer(folder)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


def make_moe(seed: int = 0, dropout: float = 0.0, **kwargs) -> SentenceTransformer:
    """The dense model, upcycled; experts made to differ, so that routing matters."""
    import moe_fast

    settings = {"num_experts": len(DOMAINS), "domains": DOMAINS, "seed": seed} | kwargs
    model = moe_fast.upcycle(make_dense(seed, dropout), **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("up_proj", "down_proj")):
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def sentence(domain: str, rng: random.Random, length: int = 4) -> str:
    return " ".join(rng.choice(WORDS[domain]) for _ in range(length))


def make_pairs(rows: int = 24, seed: int = 0, negatives: int = 0) -> Dataset:
    """Pairs that share their words in another order; the domains take turns."""
    rng = random.Random(seed)
    columns: dict[str, list[str]] = {"anchor": [], "positive": [], "domain": []}
    columns |= {f"negative_{g}": [] for g in range(negatives)}
    for row in range(rows):
        domain = DOMAINS[row % len(DOMAINS)]
        anchor = sentence(domain, rng)
        words = anchor.split()
        rng.shuffle(words)
        columns["anchor"].append(anchor)
        columns["positive"].append(" ".join([*words, rng.choice(WORDS[domain])]))
        columns["domain"].append(domain)
        for g in range(negatives):
            columns[f"negative_{g}"].append(sentence(domain, rng))
    return Dataset.from_dict(columns)


def make_flag_rows(rows: int = 12, negatives: int = 4, seed: int = 0, **columns: bool) -> Dataset:
    """FlagEmbedding rows of three positives; ``scores=True``, ``neg_q=True`` for more columns."""
    rng = random.Random(seed)
    data = []
    for number in range(rows):
        domain = DOMAINS[number % len(DOMAINS)]
        row = {
            "query": sentence(domain, rng),
            "pos": [sentence(domain, rng, 5) for _ in range(3)],
            "neg": [sentence(domain, rng, 6) for _ in range(negatives)],
            "domain": domain,
        }
        if columns.get("neg_q"):
            row["neg_q"] = [sentence(domain, rng, 3) for _ in range(negatives)]
        if columns.get("scores"):
            row["pos_scores"] = [rng.random() for _ in range(3)]
            row["neg_scores"] = [-rng.random() for _ in range(negatives)]
        data.append(row)
    return Dataset.from_list(data)


def features_of(model: SentenceTransformer, *columns: list[str]) -> list[dict[str, torch.Tensor]]:
    return [model.preprocess(column) for column in columns]


def folder_names(path: str | Path) -> set[str]:
    return {entry.name for entry in Path(path).iterdir()}
