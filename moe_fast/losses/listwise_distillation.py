"""Listwise distillation: the teacher's shares of a query's passages, against the whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_fast.losses.base import Columns
from moe_fast.losses.batch_features import text_ids
from moe_fast.losses.citations import citation_of
from moe_fast.losses.distillation import DistillationLoss
from moe_fast.losses.functional import listwise_distillation
from moe_fast.losses.negative_masks import NEGATIVES_FROM, check_masks
from moe_fast.ops.checks import check_choice


class ListwiseDistillationLoss(DistillationLoss):
    """As :class:`DistillationLoss`, but each passage also competes with those of other queries.

    The cross entropy of each of a row's passages, in their order, against all passages of the
    batch but the earlier ones of the row, weighted by the teacher's share of the passage; see
    :func:`moe_fast.losses.functional.listwise_distillation`. Columns and labels are those of
    :class:`DistillationLoss`, and so are the arguments that are not listed here. Candidates are
    those of the process's own batch.

    Args:
        mask_duplicates: never compare a passage with another query's copy of the row's texts.
        negatives_from: "all", or "same_domain" (needs the collator's ``domain_ids``).

    Raises:
        ValueError: for a value out of range, naming the argument.
    """

    citation = citation_of("chen2024m3")

    def __init__(
        self,
        model_or_loss: nn.Module,
        *,
        mask_duplicates: bool = True,
        negatives_from: str = "all",
        **settings: Any,
    ) -> None:
        super().__init__(model_or_loss, **settings)
        check_choice("negatives_from", negatives_from, NEGATIVES_FROM)
        self.mask_duplicates = mask_duplicates
        self.negatives_from = negatives_from

    def check_columns(self, columns: Columns, labels: Any) -> None:
        """As :class:`DistillationLoss`; also if domain ids that are needed are missing."""
        super().check_columns(columns, labels)
        check_masks(columns, self.negatives_from)

    def divergence(
        self,
        query: Tensor,
        passages: Tensor,
        teacher: Tensor,
        columns: Columns,
        scale: float | Tensor,
    ) -> Tensor:
        """See :meth:`DistillationLoss.divergence`."""
        ids = text_ids(columns[: 1 + passages.shape[1]]) if self.mask_duplicates else None
        return listwise_distillation(
            query,
            passages,
            teacher,
            scale=scale,
            similarity=self.similarity,
            row_ids=None if ids is None else ids[0],
            col_ids=None if ids is None else torch.stack(list(ids[1:]), dim=1),
            domain_ids=columns[0]["domain_ids"] if self.negatives_from == "same_domain" else None,
        )
