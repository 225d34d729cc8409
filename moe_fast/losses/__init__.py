"""Losses in sentence-transformers' style: ``loss(model, ...)``, then ``loss(features, labels)``.

They are plain ``nn.Module``s and need torch only; :mod:`moe_fast.losses.functional` holds the same
mathematics as functions of embeddings.
"""

from moe_fast.losses import functional
from moe_fast.losses.info_nce import InfoNCELoss

__all__ = ["InfoNCELoss", "functional"]
