"""Distillation: the student learns a teacher's ranking of each query's own candidates."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_fast.losses.base import (
    Columns,
    EmbeddingLoss,
    TemperatureLoss,
    check_num_columns,
    check_one_embedding,
    check_weight,
    temperature_metric,
)
from moe_fast.losses.citations import citation_of
from moe_fast.losses.functional import distillation
from moe_fast.ops.checks import compute_dtype


class DistillationLoss(TemperatureLoss):
    """KL(teacher || student) over each row's positive and own hard negatives.

    The student's logits are its similarities divided by ``temperature``, the teacher's are its
    scores divided by ``teacher_temperature``; see
    :func:`moe_fast.losses.functional.distillation`. Around a contrastive loss the result is that
    loss plus ``coefficient`` times the divergence; the texts are encoded once.

    sentence-transformers' ``DistillKLDivLoss`` multiplies the divergence by the square of the
    student's temperature, which makes it very small at .05. ``coefficient=temperature**2`` gives
    the same numbers.

    Columns: anchor, positive, G >= 1 hard negatives, and what else the wrapped loss needs.
    Labels: [B, 1 + G] float teacher scores, the positive's first.

    Args:
        model_or_loss: an encoder, as in :class:`moe_fast.losses.InfoNCELoss`, or a loss of this
            package over embeddings that has one.
        coefficient: the factor of the divergence, >= 0.
        temperature, learn_temperature, min_temperature, max_temperature: for the student's logits
            in the divergence; the wrapped loss keeps its own temperature.
        teacher_temperature: > 0; the teacher's scores are divided by it.
        similarity: "cosine" or "dot".

    Attributes:
        last_metrics: those of the wrapped loss, the detached ``distillation`` (unweighted) and, if
            the temperature is learned, ``distillation_temperature``.

    Raises:
        ValueError: for a value out of range, naming the argument.
    """

    citation = citation_of("lin2020distilling")

    def __init__(
        self,
        model_or_loss: nn.Module,
        *,
        coefficient: float = 1.0,
        temperature: float = 0.05,
        learn_temperature: bool = False,
        min_temperature: float = 0.01,
        max_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        similarity: str = "cosine",
    ) -> None:
        loss = model_or_loss if isinstance(model_or_loss, EmbeddingLoss) else None
        if loss is not None:
            check_one_embedding("DistillationLoss", loss)
        super().__init__(
            model_or_loss if loss is None else loss.model,
            temperature=temperature,
            learn_temperature=learn_temperature,
            min_temperature=min_temperature,
            max_temperature=max_temperature,
            similarity=similarity,
        )
        check_weight("coefficient", coefficient)
        if not 0.0 < teacher_temperature < math.inf:
            raise ValueError(
                f"teacher_temperature must be a positive, finite number; "
                f"got {teacher_temperature!r}."
            )
        self.loss = loss
        self.coefficient = coefficient
        self.teacher_temperature = teacher_temperature

    def check_columns(self, columns: Columns, labels: Any) -> None:
        """Raise ``ValueError`` unless there is a hard negative, and labels are floats [B, 1 + G].

        The wrapped loss checks the columns as well.
        """
        check_num_columns(self, columns, 3, "anchor, positive, then hard negatives")
        if self.loss is not None:
            self.loss.check_columns(columns, labels)
        candidates = 1 + self.num_negatives(len(columns))
        if not isinstance(labels, Tensor) or not labels.is_floating_point():
            given = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"labels must be float teacher scores [B, 1 + G]; got {given}.")
        if labels.dim() != 2 or labels.shape[1] != candidates:
            raise ValueError(
                f"labels must be [B, {candidates}], teacher scores of the positive and "
                f"{candidates - 1} hard negatives; got {list(labels.shape)}."
            )

    def num_negatives(self, num_columns: int) -> int:
        """The number of hard negatives per row, G, as the wrapped loss counts them.

        Without a wrapped loss every column behind the positive is one.
        """
        if self.loss is None:
            return super().num_negatives(num_columns)
        return self.loss.num_negatives(num_columns)

    def from_embeddings(self, embeddings: list[Tensor], columns: Columns, labels: Any) -> Tensor:
        """See :class:`moe_fast.losses.base.EmbeddingLoss`."""
        scale = self.current_scale()
        passages = torch.stack(embeddings[1 : 2 + self.num_negatives(len(embeddings))], dim=1)
        teacher = labels / self.teacher_temperature
        divergence = self.divergence(embeddings[0], passages, teacher, columns, scale)
        metrics = {"distillation": divergence.detach()}
        metrics |= temperature_metric(scale, "distillation_temperature")
        total = self.coefficient * divergence
        if self.loss is not None:
            total = total + self.loss.from_embeddings(embeddings, columns, labels)
            metrics = self.loss.last_metrics | metrics
        self.last_metrics = metrics
        return total

    def divergence(
        self,
        query: Tensor,
        passages: Tensor,
        teacher: Tensor,
        columns: Columns,
        scale: float | Tensor,
    ) -> Tensor:
        """The loss, [], of embeddings without ``coefficient``.

        Args:
            query, passages: [B, d] and [B, 1 + G, d], each row's own.
            teacher: [B, 1 + G], divided by the teacher's temperature.
            columns: as in :meth:`from_embeddings`.
            scale: 1 / temperature.
        """
        dtype = compute_dtype(query.dtype)
        query, keys = query.to(dtype), passages.to(dtype)
        if self.similarity == "cosine":
            query, keys = F.normalize(query, dim=-1), F.normalize(keys, dim=-1)
        return distillation(scale * (query[:, None] * keys).sum(-1), teacher)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings for the model card; the wrapped loss is given by its class name."""
        wrapped = None if self.loss is None else type(self.loss).__name__
        return super().get_config_dict() | {"loss": wrapped}
