"""A training step in chunks (CachedLoss) against the plain step of the same batch, if both fit.

A plain step costs one forward pass, and a backward pass that costs about two. The second forward
pass of the chunks therefore adds a third: the least is 4/3 of the plain step's time, apart from
padding, which sorting by length avoids. There are three kinds of batches:

- ``equal``: all texts have one length; this shows what the chunks cost.
- ``natural``: questions and answers of natural lengths, padded to each column's longest; this shows
  what the chunks save.
- ``router``: like ``equal``, with all four router losses.

sentence-transformers' cached loss is measured too, with its default of 32 texts per chunk, and with
our number of tokens per chunk.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import moe_fast
from moe_fast.losses import CachedLoss, InfoNCELoss, RouterLoss

from .cases import Candidates, Case, near
from .training_step import EXPERTS, Encoder, dense_bert, step

PLAIN = "plain"
CHUNK_TOKENS = 2048
# Batches of another shape round differently, which six layers of random weights amplify: up to
# 4e-5 in float32; in float64 the same comparison gives 4e-15.
TOLERANCE = 2e-4
DOMAINS = 4
ROUTER: dict[str, Any] = dict(
    load_balance=0.05, z_loss=0.01, mutual_information=0.01, expert_supervision=0.01
)


def cases(size: str) -> Iterator[Case]:
    """Yield a case for each kind of batch."""
    rows, dim = (6, 32) if size == "tiny" else (64, 384)
    for kind in ("equal", "natural", "router"):
        yield Case(
            f"cached step, {kind}",
            {"B": rows, "D": dim, "E": EXPERTS, "K": 1},
            "float32",
            partial(candidates, kind, rows, dim),
            baseline=PLAIN,
        )


def columns_of(rows: int, natural: bool) -> list[dict[str, Tensor]]:
    """Make two columns: of 64 tokens each, or natural: short questions, answers of 8 to 128."""
    columns = []
    for mean in (16.0, 64.0):
        lengths = torch.full((rows,), 64)
        if natural:
            lengths = (torch.randn(rows).mul(0.5).exp() * mean).long().clamp(8, 128)
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        ids = torch.randint(5, 100, mask.shape) * mask
        domains = torch.arange(rows) % DOMAINS
        columns.append({"input_ids": ids, "attention_mask": mask, "domain_ids": domains})
    return columns


def candidates(kind: str, rows: int, dim: int) -> Candidates:
    """Make the candidates; each steps a model of its own."""
    from sentence_transformers.sentence_transformer import losses as theirs

    # Larger weights make the embeddings of texts differ, like those of a trained model.
    dense = dense_bert(dim, initializer_range=0.1)
    model = moe_fast.upcycle(dense, num_experts=EXPERTS, num_experts_per_tok=1)
    columns = columns_of(rows, kind == "natural")

    def plain(encoder: Any) -> Any:
        loss = InfoNCELoss(encoder, mask_duplicates=False)
        return RouterLoss(loss, num_domains=DOMAINS, **ROUTER) if kind == "router" else loss

    losses: dict[str, Callable[[Any], nn.Module]] = {
        PLAIN: plain,
        "CachedLoss": lambda e: CachedLoss(plain(e), tokens_per_chunk=CHUNK_TOKENS),
    }
    if kind != "router":  # which theirs does not support
        peer = theirs.CachedMultipleNegativesRankingLoss
        losses["sentence-transformers, 32 texts"] = peer
        losses["sentence-transformers, tokens"] = partial(peer, mini_batch_num_tokens=CHUNK_TOKENS)
    runs = {
        name: step(Encoder(copy.deepcopy(model)), make, columns) for name, make in losses.items()
    }
    exact = step(Encoder(copy.deepcopy(model).double()), plain, columns)()
    return Candidates(runs, near(exact, TOLERANCE))
