"""The contrastive loss alone, forward and backward to embeddings that are given.

Both losses get the same leaves instead of an encoder's output, so that only the loss is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from moe_fast.losses import InfoNCELoss

from .cases import OURS, Candidates, Case, near
from .record import Work

DIM = 384
TOLERANCE = 1e-5


class Given(nn.Module):
    """An encoder that finds the embeddings among the features."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``features``."""
        return features


def cases(size: str) -> Iterator[Case]:
    """B pairs, cosine, scale 20, one direction: both libraries' defaults."""
    batches = {"tiny": [8], "quick": [512], "default": [16, 512, 2048]}.get(
        size, [16, 128, 512, 2048, 8192]
    )
    for batch in batches:
        yield case_of(batch)


def case_of(batch: int, sweep: str | None = None) -> Case:
    """One batch size."""
    # S = a . b^T, and the products of its gradient with both; two inputs and two gradients.
    flop, moved = 3.0 * 2 * batch**2 * DIM, 4.0 * 4 * batch * DIM
    shape = {"B": batch, "d": DIM}
    return Case(
        "contrastive loss, forward + backward",
        shape,
        "float32",
        lambda: candidates(batch),
        Work(flop, moved),
        sweep,
    )


def candidates(batch: int) -> Candidates:
    """Ours and sentence-transformers'."""
    leaves = [torch.randn(batch, DIM, requires_grad=True) for _ in range(2)]
    runs, absent = {OURS: run(InfoNCELoss, leaves)}, {}
    name = "sentence-transformers' loss"
    if find_spec("sentence_transformers"):
        from sentence_transformers.sentence_transformer import losses

        runs[name] = run(losses.MultipleNegativesRankingLoss, leaves)
    else:
        absent[name] = "needs sentence-transformers, which is not installed"
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    return Candidates(runs, near(plain(doubles), TOLERANCE), absent)


def plain(leaves: list[Tensor]) -> list[Tensor]:
    """The loss as it is defined, [B, B] at once, and its gradients."""
    a, b = (leaf / leaf.norm(dim=1, keepdim=True) for leaf in leaves)
    loss = nn.functional.cross_entropy(20 * a @ b.T, torch.arange(len(a)))
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def run(make_loss: Callable[[Any], nn.Module], leaves: list[Tensor]) -> Callable[[], list[Tensor]]:
    """A call that returns the loss and the gradients of both columns."""
    loss = make_loss(Given())
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
