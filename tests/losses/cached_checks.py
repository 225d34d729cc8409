"""What the tests of the gradient cache share: models, batches, gradients and their comparison."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from tiny_models import DOMAINS, WORDS, features_of, make_dense, make_moe
from torch import Tensor, nn

from moe_fast.layers import MoERouter
from moe_fast.losses import CachedLoss, RouterLoss
from moe_fast.losses.chunked_encoding import random_state_kept
from moe_fast.losses.text_chunks import cut_by_length, take_rows, text_lengths

COEFFICIENTS = {
    "load_balance": 0.3,
    "z_loss": 0.02,
    "mutual_information": 0.7,
    "expert_supervision": 0.4,
}
TOKENS = 40  # per chunk: a batch of texts of 3 to 14 tokens gets many chunks
CPU = torch.device("cpu")


def make_model(kind: str, dropout: float = 0.0):
    """``dense``, ``enforced``, ``k1``, ``k2`` or ``sentence``, in training mode."""
    if kind == "dense":
        return make_dense(dropout=dropout).train()
    if kind == "enforced":
        return make_moe(dropout=dropout, routing="enforced").train()
    settings = {
        "k1": {"num_experts_per_tok": 1},
        "k2": {"num_experts_per_tok": 2},
        "sentence": {"routing": "sentence_topk", "num_experts_per_tok": 2},
    }[kind]
    model = make_moe(dropout=dropout, **({"routing": "token_topk", "domains": None} | settings))
    with torch.no_grad():  # logits of the size of 1: the routers' own start is nearly uniform
        for module in model.modules():
            if isinstance(module, MoERouter):
                module.weight *= 20
    return model.train()


def make_batch(model, rows: int = 24, columns: int = 2, seed: int = 0) -> list[dict]:
    """Texts of unequal lengths, each row of one domain; every column has its own padding."""
    rng = random.Random(seed)
    domains = [rng.randrange(len(DOMAINS)) for _ in range(rows)]
    texts = [
        [" ".join(rng.choices(WORDS[DOMAINS[d]], k=rng.randint(1, 12))) for d in domains]
        for _ in range(columns)
    ]
    ids = torch.tensor(domains)
    extra = {"domain_ids": ids}
    if getattr(encoder_config_of(model), "routing", None) == "enforced":
        extra["expert_ids"] = ids
    return [features | extra for features in features_of(model, *texts)]


def encoder_config_of(model):
    return next(m for m in model.modules() if getattr(m, "config", None) is not None).config


def gradients(loss: nn.Module, value: Tensor) -> dict[str, Tensor]:
    """Of every parameter that has one, by ``backward``."""
    loss.zero_grad()
    value.backward()
    return {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}


def assert_same(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Relative L2 error per tensor.

    A key's bias moves every logit of a query alike and the softmax not at all: its gradient is 0
    but for rounding, and is compared with the size of its weight's.
    """
    assert actual.keys() == expected.keys()
    assert any(tensor.norm() > 1e-3 for tensor in expected.values())
    for name, tensor in expected.items():
        error = (actual[name] - tensor).norm()
        size = expected[name.replace("key.bias", "key.weight")].norm()
        assert error <= tolerance * size, (name, error, size)


def same_chunks(loss: nn.Module, columns: list[dict], tokens: int = TOKENS) -> Tensor:
    """The loss of the chunks that a cache would encode, in its order, with their whole graph."""
    inner = loss.loss if isinstance(loss, RouterLoss) else loss
    lengths = [text_lengths(column) for column in columns]
    chunks = cut_by_length(lengths, tokens, CPU)
    assert len(chunks) > 2 * len(columns)

    def embed_columns(_):
        embeddings = [None] * len(columns)
        for chunk in chunks:
            features = take_rows(columns[chunk.column], chunk)
            part = inner.model({k: v for k, v in features.items() if k in KEYS})
            vectors = part["sentence_embedding"]
            whole = embeddings[chunk.column]
            if whole is None:
                whole = vectors.new_zeros(len(columns[chunk.column]["input_ids"]), vectors.shape[1])
            embeddings[chunk.column] = whole.index_add(0, chunk.rows, vectors)
        return embeddings

    order = [(chunk.column, row) for chunk in chunks for row in chunk.rows.tolist()]
    if isinstance(loss, RouterLoss):  # it numbers texts as they are encoded
        ids = torch.tensor([int(columns[c]["domain_ids"][r]) for c, r in order])
        columns = [
            column | {"domain_ids": part}
            for column, part in zip(
                columns, ids.split([len(c["domain_ids"]) for c in columns]), strict=True
            )
        ]
    inner.embed_columns = embed_columns
    try:
        return loss(columns)
    finally:
        del inner.embed_columns


KEYS = ("input_ids", "attention_mask", "token_type_ids", "expert_ids")


def assert_cached_equals_whole(
    loss, columns, labels=None, tolerance: float = 1e-5, sizes: tuple[int, ...] = (TOKENS,)
) -> CachedLoss:
    """Value and every gradient of the cached loss, at several chunk sizes, are the loss's own."""
    with random_state_kept(CPU):
        expected = loss(columns, labels)
        wanted = gradients(loss, expected)
    cached = None
    for tokens in sizes:
        cached = CachedLoss(loss, tokens_per_chunk=tokens)
        value = cached(columns, labels)
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=0)
        assert_same(gradients(loss, value), wanted, tolerance)
    return cached
