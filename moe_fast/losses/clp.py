"""Contrastive learning penalty: InfoNCE that keeps negatives near the queries that they answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_fast.losses.base import Columns, check_num_columns
from moe_fast.losses.citations import citation_of
from moe_fast.losses.functional import contrastive_learning_penalty
from moe_fast.losses.global_sum import global_sum
from moe_fast.losses.info_nce import InfoNCELoss
from moe_fast.losses.negative_masks import check_masks
from moe_fast.ops.checks import check_count


class ContrastiveLearningPenaltyLoss(InfoNCELoss):
    """``(1 - l) * InfoNCE + l * mean of 1 - cos(h', h*)`` over negatives h' and their queries h*.

    See :func:`moe_fast.losses.functional.contrastive_learning_penalty` for the penalty, which has
    no temperature.

    Columns: anchor, positive, G hard negatives, then M queries that each of them answers: those of
    the first negative first. If there are only anchor and positive, the penalty is over the pairs
    of the batch: each positive with its own anchor as the query that it answers. Labels are
    ignored.

    Args:
        model: the encoder, as in :class:`moe_fast.losses.InfoNCELoss`.
        queries_per_negative: M. It must be given if columns follow the positive, because nothing
            else distinguishes a second negative in the fourth column from a query of the first
            negative. 0: all further columns are negatives, and the penalty is over the pairs of
            the batch.
        penalty_weight: l, in [0, 1].
        temperature, symmetric, **info_nce: as in :class:`moe_fast.losses.InfoNCELoss`.

    Attributes:
        last_metrics: those of InfoNCE, and the detached ``info_nce`` and ``penalty``, unweighted.

    Raises:
        ValueError: for a value out of range, naming the argument.
    """

    citation = citation_of("yu2024clp")

    def __init__(
        self,
        model: nn.Module,
        *,
        queries_per_negative: int | None = None,
        penalty_weight: float = 0.1,
        temperature: float = 0.02,
        **info_nce: Any,
    ) -> None:
        super().__init__(model, temperature=temperature, **info_nce)
        if queries_per_negative is not None:
            check_count("queries_per_negative", queries_per_negative, at_least=0)
        if not 0.0 <= penalty_weight <= 1.0:
            raise ValueError(f"penalty_weight must lie in [0, 1]; got {penalty_weight!r}.")
        self.queries_per_negative = queries_per_negative
        self.penalty_weight = penalty_weight

    def check_columns(self, columns: Columns, labels: Any) -> None:
        """Raise ``ValueError`` unless there are anchor, positive and G * (1 + M) further columns.

        Domain ids must be there if ``negatives_from`` needs them.
        """
        check_num_columns(
            self, columns, 2, "anchor, positive, then hard negatives, then their queries"
        )
        check_masks(columns, self.negatives_from)
        rest = len(columns) - 2
        if rest and self.queries_per_negative is None:
            raise ValueError(
                f"queries_per_negative must be given where columns follow the positive; got {rest} "
                "of them and None. Say 0 if all are hard negatives, 1 if the second half are the "
                "queries that they answer."
            )
        if rest % (1 + (self.queries_per_negative or 0)):
            raise ValueError(
                f"queries_per_negative={self.queries_per_negative} needs a multiple of "
                f"{1 + (self.queries_per_negative or 0)} columns behind the positive (each "
                f"negative and its queries); got {rest}."
            )

    def num_negatives(self, num_columns: int) -> int:
        """The number of hard negatives per row, G, from the number of columns.

        A row has an anchor, a positive, G negatives, and M queries for each negative:
        2 + G * (1 + M) columns. :meth:`check_columns` refuses other counts.
        """
        return (num_columns - 2) // (1 + (self.queries_per_negative or 0))

    def from_embeddings(self, embeddings: list[Tensor], columns: Columns, labels: Any) -> Tensor:
        """See :class:`moe_fast.losses.base.EmbeddingLoss`."""
        candidates = 2 + self.num_negatives(len(columns))
        contrastive = super().from_embeddings(embeddings[:candidates], columns[:candidates], labels)
        penalty = self._penalty(embeddings, candidates)
        self.last_metrics |= {"info_nce": contrastive.detach(), "penalty": penalty.detach()}
        return (1 - self.penalty_weight) * contrastive + self.penalty_weight * penalty

    def _penalty(self, embeddings: list[Tensor], candidates: int) -> Tensor:
        """Average the penalty over the negatives' queries, or else over the batch's pairs."""
        anchors, positives = embeddings[:2]
        negatives, queries = embeddings[2:candidates], embeddings[candidates:]
        if queries:
            repeated = [n for n in negatives for _ in range(len(queries) // len(negatives))]
            negative, query = torch.cat(repeated), torch.cat(queries)
        else:
            negative, query = positives, anchors
        penalty = contrastive_learning_penalty(negative, query)
        if not self.gathers:
            return penalty
        pairs = penalty.new_tensor(len(negative))
        return global_sum(penalty * pairs) / global_sum(pairs)
