"""Short real texts of three domains, the standard library's docstrings, and a model for them."""

from __future__ import annotations

import functools
import inspect
import pathlib
import shutil
import statistics
import string
import textwrap
import threading

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from transformers import BertConfig, PreTrainedTokenizerFast

SOURCES = {
    "numbers": (statistics, statistics.NormalDist),
    "files": (shutil, pathlib.Path, pathlib.PurePath),
    "threads": (threading, threading.Thread, threading.Barrier, threading.Condition),
    "words": (string, textwrap, textwrap.TextWrapper, str),
}
DOMAINS = list(SOURCES)
MAX_LENGTH = 48


@functools.cache
def passages() -> list[tuple[str, str, str]]:
    """(domain, first paragraph, next paragraph) of docstrings, the domains taking turns."""
    by_domain = []
    for domain, owners in SOURCES.items():
        found = {}
        for owner in owners:
            for _, thing in inspect.getmembers(owner):
                parts = (inspect.getdoc(thing) or "").split("\n\n") if callable(thing) else []
                if len(parts) > 1 and len(parts[1].split()) > 5:
                    found.setdefault(" ".join(parts[0].split()), " ".join(parts[1].split()))
        by_domain.append([(domain, first, second) for first, second in found.items()][:12])
    return [row for rows in zip(*by_domain, strict=False) for row in rows]


def pairs() -> Dataset:
    """Columns anchor, positive and domain."""
    domains, anchors, positives = zip(*passages(), strict=True)
    return Dataset.from_dict(
        {"anchor": list(anchors), "positive": list(positives), "domain": list(domains)}
    )


def labelled_pairs() -> Dataset:
    """Columns query, answer, domain and label: with its answer, and one of another domain."""
    rows = []
    texts = passages()
    for i, (domain, query, answer) in enumerate(texts):
        other = texts[(i + 1) % len(texts)][2]
        rows += [
            {"query": query, "answer": answer, "domain": domain, "label": 1.0},
            {"query": query, "answer": other, "domain": domain, "label": 0.0},
        ]
    return Dataset.from_list(rows)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cased words of the texts."""
    words = Tokenizer(WordLevel(unk_token="[UNK]"))
    words.normalizer = Lowercase()
    words.pre_tokenizer = Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = WordLevelTrainer(special_tokens=special, show_progress=False)
    words.train_from_iterator([text for _, *texts in passages() for text in texts], trainer)
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=MAX_LENGTH,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
    )


def make_dense(model_class, **settings):
    """A random BERT of width 32 with the class's head."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        cls_token_id=2,
        **settings,
    )
    return model_class(config)


def falls(losses: list[float]) -> bool:
    """Whether the last third of the losses lies clearly below the first."""
    third = len(losses) // 3
    return sum(losses[-third:]) < 0.95 * sum(losses[:third])
