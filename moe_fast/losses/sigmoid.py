"""The sigmoid loss of SigLIP, for any sentence encoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from moe_fast.losses.base import (
    Columns,
    TemperatureLoss,
    check_num_columns,
    temperature_metric,
)
from moe_fast.losses.citations import citation_of
from moe_fast.losses.functional import sigmoid_loss
from moe_fast.losses.negative_masks import NEGATIVES_FROM, batch_masks, check_masks, interleave
from moe_fast.ops.checks import check_choice


class SigmoidLoss(TemperatureLoss):
    """Classifies every pair of the batch as positive or negative, without a softmax.

    See :func:`moe_fast.losses.functional.sigmoid_loss` for the mathematics. The temperature is
    learned as its logarithm (from .1: a scale of 10, SigLIP's start) and so is the bias, from -10;
    give both a learning rate of their own, as described in :class:`moe_fast.losses.InfoNCELoss`.

    Columns: anchor, positive, any number of hard negatives; ``group_ids`` as in
    :class:`moe_fast.losses.InfoNCELoss`. Labels are ignored.

    Args:
        model: the encoder, as in :class:`moe_fast.losses.InfoNCELoss`.
        temperature, learn_temperature, min_temperature, max_temperature: the scale is 1 /
            temperature.
        bias: is added to the scaled similarities; if it is learned, its initial value.
        learn_bias: makes ``logit_bias`` a parameter.
        similarity: "cosine" or "dot".
        mask_duplicates, negatives_from: as in :class:`moe_fast.losses.InfoNCELoss`.

    Attributes:
        last_metrics: after a call, the detached ``in_batch_accuracy`` and, if they are learned, the
            ``temperature`` and the ``logit_bias``.

    Raises:
        ValueError: for a value out of range, naming the argument.
    """

    citation = citation_of("zhai2023siglip")

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 0.1,
        learn_temperature: bool = True,
        min_temperature: float = 0.01,
        max_temperature: float = 1.0,
        bias: float = -10.0,
        learn_bias: bool = True,
        similarity: str = "cosine",
        mask_duplicates: bool = True,
        negatives_from: str = "all",
    ) -> None:
        super().__init__(
            model,
            temperature=temperature,
            learn_temperature=learn_temperature,
            min_temperature=min_temperature,
            max_temperature=max_temperature,
            similarity=similarity,
        )
        check_choice("negatives_from", negatives_from, NEGATIVES_FROM)
        if not math.isfinite(bias):
            raise ValueError(f"bias must be finite; got {bias!r}.")
        self.learn_bias = learn_bias
        self.mask_duplicates = mask_duplicates
        self.negatives_from = negatives_from
        self._bias = float(bias)
        if learn_bias:
            self.logit_bias = nn.Parameter(torch.tensor(self._bias))

    def check_columns(self, columns: Columns, labels: Any) -> None:
        """Raise ``ValueError`` if anchor, positive or domain ids that are needed are missing."""
        check_num_columns(self, columns, 2, "anchor, positive, then hard negatives")
        check_masks(columns, self.negatives_from)

    def from_embeddings(self, embeddings: list[Tensor], columns: Columns, labels: Any) -> Tensor:
        """See :class:`moe_fast.losses.base.EmbeddingLoss`."""
        masks = batch_masks(columns, self.mask_duplicates, self.negatives_from)
        scale = self.current_scale()
        loss, metrics = sigmoid_loss(
            embeddings[0],
            embeddings[1],
            interleave(embeddings[2:]) if len(embeddings) > 2 else None,
            scale=scale,
            bias=self.logit_bias if self.learn_bias else self._bias,
            similarity=self.similarity,
            return_metrics=True,
            **masks,
        )
        self.last_metrics = metrics | temperature_metric(scale)
        if self.learn_bias:
            self.last_metrics["logit_bias"] = self.logit_bias.detach().clone()
        return loss

    @property
    def bias(self) -> float:
        """The current bias as a number; reading a learned one on a GPU synchronises."""
        return self.logit_bias.item() if self.learn_bias else self._bias
