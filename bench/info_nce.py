"""The contrastive loss alone, forward and backward to embeddings that are given.

All losses get the same leaves instead of an encoder's output, so that only the loss is compared.
``its cached loss`` is sentence-transformers' at the default chunk of 32 rows and at 512. Both
directions (``symmetric``) cost the cached loss most: it takes the logits of a chunk twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from moe_fast.losses import InfoNCELoss

from .cases import OURS, Candidates, Case, near
from .record import Work

DIM, SCALE = 384, 20.0
TOLERANCE = 1e-5
THEIRS, CACHED = "sentence-transformers' loss", "its cached loss"
SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


class Given(nn.Module):
    """An encoder that finds the embeddings among the features."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``features``."""
        return features


def cases(size: str) -> Iterator[Case]:
    """B pairs, cosine, scale 20: one direction, both libraries' default, then both."""
    batches = {"tiny": [8], "quick": [512], "default": [16, 512, 2048]}.get(
        size, [16, 128, 512, 2048, 8192]
    )
    for batch in batches:
        yield case_of(batch)
    yield case_of(batches[-1], symmetric=True)


def case_of(batch: int, sweep: str | None = None, symmetric: bool = False) -> Case:
    """One batch size."""
    # S = a . b^T, and the products of its gradient with both; two inputs and two gradients.
    flop, moved = 3.0 * 2 * batch**2 * DIM, 4.0 * 4 * batch * DIM
    return Case(
        f"contrastive loss, {'symmetric, ' if symmetric else ''}forward + backward",
        {"B": batch, "d": DIM},
        "float32",
        partial(candidates, batch, symmetric),
        Work(flop, moved),
        sweep,
    )


def candidates(batch: int, symmetric: bool) -> Candidates:
    """Ours and sentence-transformers'."""
    leaves = [torch.randn(batch, DIM, requires_grad=True) for _ in range(2)]
    names = [OURS, THEIRS, *([f"{CACHED}, {rows}" for rows in (32, 512)] if symmetric else [])]
    absent = {}
    if find_spec("sentence_transformers") is None:
        reason = "needs sentence-transformers, which is not installed"
        absent = dict.fromkeys(names[1:], reason)
    runs = {name: run_of(name, leaves, symmetric) for name in names if name not in absent}
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    return Candidates(runs, near(plain(doubles, symmetric), TOLERANCE), absent)


def plain(leaves: list[Tensor], symmetric: bool) -> list[Tensor]:
    """The loss as it is defined, [B, B] at once, and its gradients."""
    a, b = (leaf / leaf.norm(dim=1, keepdim=True) for leaf in leaves)
    scores, labels = SCALE * a @ b.T, torch.arange(len(a))
    loss = nn.functional.cross_entropy(scores, labels)
    if symmetric:
        loss = (loss + nn.functional.cross_entropy(scores.T, labels)) / 2
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def run_of(name: str, leaves: list[Tensor], symmetric: bool) -> Callable[[], list[Tensor]]:
    """A call that returns the loss and the gradients of both columns."""
    if name.startswith(CACHED):
        return cached(int(name.partition(", ")[2]), leaves)
    if name == OURS:
        loss: Any = InfoNCELoss(Given(), temperature=1 / SCALE, symmetric=symmetric)
    else:
        from sentence_transformers.sentence_transformer import losses

        settings: dict[str, Any] = SYMMETRIC if symmetric else {}
        loss = losses.MultipleNegativesRankingLoss(Given(), scale=SCALE, **settings)
    # The ids stand for texts that all differ; a loss may look for duplicates among them.
    ids = torch.arange(len(leaves[0]))[:, None]

    def call() -> list[Tensor]:
        features = [
            {"sentence_embedding": leaf, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            for leaf in leaves
        ]
        value = loss(features, None)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    return call


def cached(rows: int, leaves: list[Tensor]) -> Callable[[], list[Tensor]]:
    """The loss half of sentence-transformers' cached loss, ``rows`` of logits at a time."""
    from sentence_transformers.sentence_transformer import losses

    loss = losses.CachedMultipleNegativesRankingLoss(
        nn.Sequential(nn.Identity()), scale=SCALE, mini_batch_size=rows, **SYMMETRIC
    )

    def call() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        value = loss.calculate_loss([[leaf] for leaf in leaves], with_backward=True)
        return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    return call
