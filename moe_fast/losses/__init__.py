"""Losses in sentence-transformers' style: ``loss(model, ...)``, then ``loss(features, labels)``.

They are plain ``nn.Module``s and need torch only; :mod:`moe_fast.losses.functional` holds the same
mathematics as functions of tensors. Over embeddings: :class:`InfoNCELoss`,
:class:`ContrastiveLearningPenaltyLoss`, :class:`MultipleNegativesRankingPlusLoss`,
:class:`SigmoidLoss`. Around one of these: :class:`DistillationLoss`,
:class:`ListwiseDistillationLoss`, :class:`MatryoshkaLoss`. Over the outputs of an encoder with
three heads: :class:`MultiHeadInfoNCELoss`. Around any loss of a mixture of experts:
:class:`RouterLoss`. Around all of these, for batches that do not fit in memory:
:class:`CachedLoss`.
"""

from moe_fast.losses import functional
from moe_fast.losses.cached import CachedLoss
from moe_fast.losses.clp import ContrastiveLearningPenaltyLoss
from moe_fast.losses.distillation import DistillationLoss
from moe_fast.losses.info_nce import InfoNCELoss
from moe_fast.losses.listwise_distillation import ListwiseDistillationLoss
from moe_fast.losses.matryoshka import MatryoshkaLoss
from moe_fast.losses.mnr_plus import MultipleNegativesRankingPlusLoss
from moe_fast.losses.multi_head import MultiHeadInfoNCELoss
from moe_fast.losses.router import RouterLoss
from moe_fast.losses.sigmoid import SigmoidLoss

__all__ = [
    "CachedLoss",
    "ContrastiveLearningPenaltyLoss",
    "DistillationLoss",
    "InfoNCELoss",
    "ListwiseDistillationLoss",
    "MatryoshkaLoss",
    "MultiHeadInfoNCELoss",
    "MultipleNegativesRankingPlusLoss",
    "RouterLoss",
    "SigmoidLoss",
    "functional",
]
