"""Multiple negatives ranking with targets chosen by the batch's own similarities."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moe_fast.losses.base import (
    Columns,
    TemperatureLoss,
    temperature_metric,
    warn_of_lone_pair,
)
from moe_fast.losses.citations import citation_of
from moe_fast.losses.functional import mnr_plus


class MultipleNegativesRankingPlusLoss(TemperatureLoss):
    """Cross entropy in both directions, with targets chosen by the batch's own similarities.

    See :func:`moe_fast.losses.functional.mnr_plus` for the mathematics. The defaults give the newer
    form of the source, without a temperature; ``learn_temperature=True`` gives the older one.

    Columns: anchor and positive, no others. Labels are ignored.

    Args:
        model: the encoder, as in :class:`moe_fast.losses.InfoNCELoss`.
        temperature, learn_temperature, min_temperature, max_temperature: logits are divided by the
            temperature; the similarities that choose the targets are multiplied by it.
        similarity: "dot", or "cosine" to normalise first.

    Attributes:
        last_metrics: after a call, the detached ``in_batch_accuracy``, ``own_targets`` (the share
            of targets that are the row's own pair) and, if it is learned, the ``temperature``.

    Raises:
        ValueError: for a value out of range, naming the argument.
    """

    citation = citation_of("hallee2024contrastive")

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        min_temperature: float = 0.01,
        max_temperature: float = 100.0,
        similarity: str = "dot",
    ) -> None:
        super().__init__(
            model,
            temperature=temperature,
            learn_temperature=learn_temperature,
            min_temperature=min_temperature,
            max_temperature=max_temperature,
            similarity=similarity,
        )

    def check_columns(self, columns: Columns, labels: Any) -> None:
        """Raise ``ValueError`` unless there are two columns, anchor and positive."""
        if len(columns) != 2:
            raise ValueError(
                f"{type(self).__name__} needs two text columns (anchor, positive; it has no hard "
                f"negatives); got {len(columns)}."
            )

    def from_embeddings(self, embeddings: list[Tensor], columns: Columns, labels: Any) -> Tensor:
        """See :class:`moe_fast.losses.base.EmbeddingLoss`."""
        if len(embeddings[0]) == 1:
            warn_of_lone_pair()
        scale = self.current_scale()
        loss, metrics = mnr_plus(
            *embeddings, scale=scale, similarity=self.similarity, return_metrics=True
        )
        self.last_metrics = metrics | temperature_metric(scale)
        return loss
