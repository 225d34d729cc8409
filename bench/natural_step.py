"""A training step on texts of natural lengths: packed against padded.

The mixture of :mod:`bench.embedding` trains on one batch of questions and answers, cut to 256
tokens: forward, loss, backward and AdamW, without a gradient cache.

- ``moe_fast``: ``attn_implementation="moe_fast"``, which packs, our experts, ``InfoNCELoss``.
- ``padded, ours``: the same without packing.
- ``padded, eager``: the same weights with transformers' eager loop over experts, and
  sentence-transformers' ``MultipleNegativesRankingLoss``, which holds all logits of the batch.

``natural step beside dense`` asks whether a mixture costs more than the model that it was
made from: five experts, enforced routing, the pairs' domains in turn, all weights in bfloat16.

- ``moe_fast``: packed, ``InfoNCELoss``.
- ``dense``: the dense model as sentence-transformers trains it, padded, with its
  ``MultipleNegativesRankingLoss``.

There is no dropout, so that loss and gradients can be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import moe_fast
from moe_fast.losses import CachedLoss, InfoNCELoss

from . import embedding
from .cases import OURS, Candidates, Case, near
from .embedding import DENSE, dense_and_mixture, pretrained, read_pairs
from .moe_mlp import with_eager_experts
from .training_step import step

BESIDE_DENSE, FEW_EXPERTS = "natural step beside dense", 5
TOLERANCE = 1e-3  # in float32, through six layers; a token in another expert gives 1e-2 and more
# In bfloat16. The loss is small, so that its gradient is a difference of nearly equal numbers.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 0.05, 0.7


def cases(size: str) -> Iterator[Case]:
    """Yield one batch of pairs."""
    batch = {"tiny": 4, "quick": 16, "default": 16}.get(size, 128)
    yield Case("natural step", {"B": batch}, "float32", partial(candidates, batch))
    batch = min(batch, 64)
    shape = {"B": batch, "E": FEW_EXPERTS}
    yield Case(BESIDE_DENSE, shape, "bfloat16", partial(beside_dense, batch))


def candidates(batch: int) -> Candidates:
    """Make the candidates; each steps a model of its own, with equal weights."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    padded = without_dropout(dense_and_mixture(torch.float32)[1])
    eager = with_eager_experts(padded)
    packed = copy.deepcopy(padded)
    packed.transformers_model.set_attn_implementation("moe_fast")
    columns = [padded.preprocess(list(texts)) for texts in zip(*read_pairs(batch), strict=True)]
    ours = partial(InfoNCELoss, mask_duplicates=False)
    runs = {
        OURS: step(packed, ours, columns),
        "padded, ours": step(padded, ours, columns),
        "padded, eager": step(eager, MultipleNegativesRankingLoss, columns),
    }
    exact = step(copy.deepcopy(padded).double(), ours, columns)()
    return Candidates(runs, near(exact, TOLERANCE))


def beside_dense(batch: int) -> Candidates:
    """Make a mixture of equal experts, and the dense model, whose loss is the same."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    dense = without_dropout(pretrained())
    dense.max_seq_length = embedding.MAX_TOKENS
    domains = [f"domain {number}" for number in range(FEW_EXPERTS)]
    moe = moe_fast.upcycle(dense, num_experts=FEW_EXPERTS, routing="enforced", domains=domains)
    moe.transformers_model.set_attn_implementation("moe_fast")
    columns = [dense.preprocess(list(texts)) for texts in zip(*read_pairs(batch), strict=True)]
    ids = {"domain_ids": torch.arange(batch).remainder(FEW_EXPERTS)}
    ours = partial(InfoNCELoss, mask_duplicates=False)
    # In chunks, which changes no gradient: float32 activations of the batch take gigabytes.
    exact = step(copy.deepcopy(moe), in_chunks, [column | ids for column in columns])()
    runs = {
        OURS: step(moe.bfloat16(), ours, [column | ids for column in columns]),
        DENSE: step(dense.bfloat16(), MultipleNegativesRankingLoss, columns),
    }

    def check(outputs: dict[str, Any]) -> None:
        near(exact[:1], LOSS_TOLERANCE)({name: found[:1] for name, found in outputs.items()})
        near(exact[1:], GRADIENT_TOLERANCE)({OURS: outputs[OURS][1:]})

    return Candidates(runs, check)


def in_chunks(model: Any) -> CachedLoss:
    """Our loss, with the activations of few texts at a time."""
    return CachedLoss(InfoNCELoss(model, mask_duplicates=False), tokens_per_chunk=2048)


def without_dropout(model: Any) -> Any:
    """Switch dropout off, in training too."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model
