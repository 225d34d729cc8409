"""A training step on texts of natural lengths: packed against padded.

The mixture of :mod:`bench.embedding` trains on one batch of questions and answers, cut to 256
tokens: forward, loss, backward and AdamW, without a gradient cache.

- ``moe_fast``: ``attn_implementation="moe_fast"``, which packs, our experts, ``InfoNCELoss``.
- ``padded, ours``: the same without packing.
- ``padded, eager``: the same weights with transformers' eager loop over experts, and
  sentence-transformers' ``MultipleNegativesRankingLoss``, which holds all logits of the batch.

There is no dropout, so that loss and gradients can be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch

from moe_fast.losses import InfoNCELoss

from .cases import OURS, Candidates, Case, near
from .embedding import dense_and_mixture, read_pairs
from .moe_mlp import with_eager_experts
from .training_step import step

TOLERANCE = 1e-3  # in float32, through six layers; a token in another expert gives 1e-2 and more


def cases(size: str) -> Iterator[Case]:
    """Yield one batch of pairs."""
    batch = {"tiny": 4, "quick": 16, "default": 16}.get(size, 128)
    yield Case("natural step", {"B": batch}, "float32", partial(candidates, batch))


def candidates(batch: int) -> Candidates:
    """Make the candidates; each steps a model of its own, with equal weights."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    _, padded = dense_and_mixture(torch.float32)
    for module in padded.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
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
