"""The contrastive loss alone, forward and backward, from given embeddings.

All losses get the same leaves instead of an encoder's output, so only the loss is compared. Ours
has its defaults, but does not compare texts, which sentence-transformers' does not do either; with
``texts compared`` it does. ``its cached loss`` is sentence-transformers', with its default chunk of
32 rows and with 512. In both directions (``symmetric``) the cached loss costs most: it computes the
logits of a chunk twice. The matrix products of our loss are also timed alone: they are the floor
for the rest of its work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from moe_fast.losses import InfoNCELoss
from moe_fast.ops.cpu_matmul import add_product, multiply
from moe_fast.ops.info_nce.tiles import tile_size

from .cases import OURS, Candidates, Case, near
from .record import Work

DIM, SCALE = 384, 20.0
TOLERANCE = 1e-5
TEXTS = "moe_fast, texts compared"
THEIRS, CACHED = "sentence-transformers' loss", "its cached loss"
PRODUCTS = "moe_fast's four products alone"
SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


def cases(size: str) -> Iterator[Case]:
    """Yield B pairs, cosine, scale 20: one direction (both libraries' default), then both."""
    batches = {"tiny": [8], "quick": [512], "default": [16, 64, 256, 512, 2048]}.get(
        size, [16, 64, 128, 256, 512, 2048, 8192]
    )
    for batch in batches:
        yield case_of(batch)
    yield case_of(batches[-1], symmetric=True)


def case_of(batch: int, sweep: str | None = None, symmetric: bool = False) -> Case:
    """Make the case of one batch size."""
    # FLOP: S = a . b^T, and its gradient times a and b. Bytes: two inputs and two gradients.
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
    """Make ours and sentence-transformers' losses."""
    leaves = [torch.randn(batch, DIM, requires_grad=True) for _ in range(2)]
    theirs = [THEIRS, *([f"{CACHED}, {rows}" for rows in (32, 512)] if symmetric else [])]
    absent = {}
    if find_spec("sentence_transformers") is None:
        reason = "needs sentence-transformers, which is not installed"
        absent, theirs = dict.fromkeys(theirs, reason), []
    names = [OURS, TEXTS, *theirs, *([PRODUCTS] if symmetric else [])]
    runs = {name: run_of(name, leaves, symmetric) for name in names}
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    check = near(plain(doubles, symmetric), TOLERANCE, [PRODUCTS])
    return Candidates(runs, check, absent)


def plain(leaves: list[Tensor], symmetric: bool) -> list[Tensor]:
    """Compute the loss by its definition, with all [B, B] logits, and its gradients."""
    a, b = (leaf / leaf.norm(dim=1, keepdim=True) for leaf in leaves)
    scores, labels = SCALE * a @ b.T, torch.arange(len(a))
    loss = nn.functional.cross_entropy(scores, labels)
    if symmetric:
        loss = (loss + nn.functional.cross_entropy(scores.T, labels)) / 2
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def run_of(name: str, leaves: list[Tensor], symmetric: bool) -> Callable[[], list[Tensor]]:
    """Return a function that returns the loss, and the gradients of both columns."""
    if name.startswith(CACHED):
        return cached(int(name.partition(", ")[2]), leaves)
    if name == PRODUCTS:
        return partial(products, *(leaf.detach() for leaf in leaves))
    if name in (OURS, TEXTS):
        settings: dict[str, Any] = {"symmetric": symmetric, "mask_duplicates": name == TEXTS}
        loss: Any = InfoNCELoss(nn.Identity(), temperature=1 / SCALE, **settings)
    else:
        from sentence_transformers.sentence_transformer import losses

        settings = SYMMETRIC if symmetric else {}
        loss = losses.MultipleNegativesRankingLoss(nn.Identity(), scale=SCALE, **settings)
    # The ids stand for different texts; a loss may search them for duplicates.
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
    """Return the loss part of sentence-transformers' cached loss, in chunks of ``rows`` rows."""
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


def products(a: Tensor, b: Tensor) -> list[Tensor]:
    """Compute only the products of our loss over all tiles: one forward, three backward."""
    grads, size = [torch.zeros_like(a), torch.zeros_like(b)], tile_size(a.device)
    for q, grad_q in zip(a.split(size), grads[0].split(size), strict=True):
        for k, grad_k in zip(b.split(size), grads[1].split(size), strict=True):
            multiply(q, k.t())  # the forward's
            logits = multiply(q, k.t())
            add_product(grad_q, logits, k)
            add_product(grad_k, logits.t(), q)
    return grads
