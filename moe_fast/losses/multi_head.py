"""MultiHeadInfoNCELoss: trains dense, sparse and multi-vector heads together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_fast.losses.base import (
    Columns,
    TemperatureLoss,
    check_num_columns,
    check_weight,
    temperature_metric,
    warn_of_lone_pair,
)
from moe_fast.losses.batch_features import encoder_features, text_ids
from moe_fast.losses.citations import citation_of
from moe_fast.losses.cross_device_negatives import table_of
from moe_fast.losses.functional.head_scores import ScoredTexts, head_scores
from moe_fast.losses.functional.penalty import contrastive_learning_penalty
from moe_fast.losses.functional.sparse_floor import sparse_floor
from moe_fast.losses.functional.three_head_loss import combined_scores, three_head_loss
from moe_fast.losses.global_sum import global_sum, several_processes
from moe_fast.losses.head_embeddings import HeadEmbeddings, head_embeddings
from moe_fast.ops.checks import check_count, compute_dtype

SCORE_WEIGHTS = (1.0, 0.3, 1.0)  # as published for BGE-M3


class MultiHeadInfoNCELoss(TemperatureLoss):
    """In-batch contrastive losses of three heads and of their sum, with self-distillation.

    See :mod:`moe_fast.losses.functional.three_head_loss` for the mathematics; with the defaults the
    weights are those published for BGE-M3. The model is an encoder with three heads, such as one
    made by :func:`moe_fast.add_three_heads`. The scores of a batch are
    computed in tiles: memory holds the heads' outputs, their gradients, and a few matrices of a
    score per query and candidate, but no B x B x L x L or B x L x V tensor. Put
    :class:`moe_fast.losses.CachedLoss` around it for batches that do not fit in memory.

    Columns: anchor, positive, G hard negatives, then (with ``queries_per_negative``) the M queries
    that each negative answers, those of the first negative first. Candidates of a row are all
    positives and hard negatives of the batch. Labels: with ``teacher_scores``, [B, 1 + G], a
    teacher's scores of each row's own passages; otherwise they are ignored.

    Args:
        model: an encoder with three heads.
        temperature, learn_temperature, min_temperature, max_temperature: as in
            :class:`moe_fast.losses.InfoNCELoss`.
        score_weights: of the dense, sparse and multi-vector score in the combined one.
        sparse_weight: of the sparse head's losses.
        self_distillation_from: the number of training steps after which the combined score becomes
            the heads' teacher; ``None``: never. A step is a call with gradients.
        teacher_scores: labels are a teacher's scores; the losses become listwise.
        teacher_temperature: the teacher's scores are divided by it.
        sparse_floor: of the share of tokens that have a positive sparse weight in the first
            training batch, how much is kept; 0: nothing is kept, as published. See
            :mod:`moe_fast.losses.functional.sparse_floor`.
        sparse_margin: the least weight of a token that is kept.
        queries_per_negative: M.
        penalty_weight: l; the loss becomes ``(1 - l) * loss + l * penalty``, where the penalty is
            that of :class:`moe_fast.losses.ContrastiveLearningPenaltyLoss` on the dense vectors.
            Only with ``queries_per_negative``.
        mask_duplicates: as in :class:`moe_fast.losses.InfoNCELoss`.
        gather_across_devices: the candidates of all training processes are candidates of each row.
            A process holds those of one other process at a time.

    Attributes:
        last_metrics: after a call, detached [] tensors: ``in_batch_accuracy`` (of the combined
            score), ``loss_dense`` and so on, ``sparse_nonzeros`` (tokens with a positive weight per
            text), and the ``temperature`` if it is learned.

    Raises:
        ValueError: for a value out of range, naming the argument.
    """

    citation = citation_of("chen2024m3")
    several_outputs = True
    steps: Tensor
    first_share: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 0.02,
        learn_temperature: bool = False,
        min_temperature: float = 0.01,
        max_temperature: float = 1.0,
        score_weights: Sequence[float] = SCORE_WEIGHTS,
        sparse_weight: float = 0.1,
        self_distillation_from: int | None = 0,
        teacher_scores: bool = False,
        teacher_temperature: float = 1.0,
        sparse_floor: float = 0.6,
        sparse_margin: float = 0.01,
        queries_per_negative: int = 0,
        penalty_weight: float = 0.1,
        mask_duplicates: bool = True,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(
            model,
            temperature=temperature,
            learn_temperature=learn_temperature,
            min_temperature=min_temperature,
            max_temperature=max_temperature,
            similarity="dot",
        )
        if len(score_weights) != 3:
            raise ValueError(f"score_weights must be three numbers; got {list(score_weights)}.")
        for weight in score_weights:
            check_weight("score_weights", weight)
        check_weight("sparse_weight", sparse_weight)
        if self_distillation_from is not None:
            check_count("self_distillation_from", self_distillation_from, at_least=0)
        check_count("queries_per_negative", queries_per_negative, at_least=0)
        for name, share in (("sparse_floor", sparse_floor), ("penalty_weight", penalty_weight)):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1]; got {share!r}.")
        for name, value in (
            ("sparse_margin", sparse_margin),
            ("teacher_temperature", teacher_temperature),
        ):
            if not 0.0 < value < math.inf:
                raise ValueError(f"{name} must be a positive, finite number; got {value!r}.")
        self.score_weights = tuple(score_weights)
        self.sparse_weight = sparse_weight
        self.self_distillation_from = self_distillation_from
        self.teacher_scores = teacher_scores
        self.teacher_temperature = teacher_temperature
        self.sparse_floor = sparse_floor
        self.sparse_margin = sparse_margin
        self.queries_per_negative = queries_per_negative
        self.penalty_weight = penalty_weight
        self.mask_duplicates = mask_duplicates
        self.gather_across_devices = gather_across_devices
        # Saved with the trainer's checkpoints.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("first_share", torch.full((), torch.nan))

    @property
    def gathers(self) -> bool:
        """Whether a call now exchanges candidates with other processes."""
        return self.gather_across_devices and torch.is_grad_enabled() and several_processes()

    def num_negatives(self, num_columns: int) -> int:
        """The number of hard negatives per row, G, from the number of columns."""
        return (num_columns - 2) // (1 + self.queries_per_negative)

    def check_columns(self, columns: Columns, labels: Any) -> None:
        """Raise ``ValueError`` for columns or labels that do not fit."""
        check_num_columns(self, columns, 2, "anchor, positive, then hard negatives")
        if (len(columns) - 2) % (1 + self.queries_per_negative):
            raise ValueError(
                f"queries_per_negative={self.queries_per_negative} needs a multiple of "
                f"{1 + self.queries_per_negative} columns behind the positive; got "
                f"{len(columns) - 2}."
            )
        if "group_ids" in columns[0]:
            raise ValueError("MultiHeadInfoNCELoss takes one positive per row; got group_ids.")
        if not self.teacher_scores:
            return
        passages = 1 + self.num_negatives(len(columns))
        shape = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.shape[1] != passages:
            raise ValueError(
                f"labels must hold a teacher's scores of each row's {passages} passages, "
                f"[B, {passages}]; got {shape}."
            )
        if not labels.isfinite().all():
            raise ValueError("labels, the teacher's scores, must be finite.")

    def embed_columns(self, columns: Columns) -> list[Any]:
        """Encode each column in one forward pass; returns its ``HeadEmbeddings``."""
        return [self._embed(column) for column in columns]

    def _embed(self, column: Mapping[str, Any]) -> HeadEmbeddings:
        return head_embeddings(self.model(encoder_features(self.model, column)), self.model)

    def from_embeddings(self, embeddings: list[Any], columns: Columns, labels: Any) -> Tensor:
        """Compute the loss, [], from each column's ``HeadEmbeddings``."""
        count = 2 + self.num_negatives(len(columns))
        used: list[HeadEmbeddings] = embeddings[:count]
        scale = self.current_scale()
        if count == 2 and len(used[0]) == 1 and not self.gathers:
            return self._of_lone_pair(used, scale)
        scored = [ScoredTexts.of(texts) for texts in used]
        scores = head_scores(scored[0], scored[1:], self.gathers)
        own, excluded = self._candidates(columns[:count], len(used[0]), scores[0])
        rows, parts = three_head_loss(
            scores,
            own,
            excluded,
            scale=scale,
            score_weights=self.score_weights,
            sparse_weight=self.sparse_weight,
            distils=self._distils(),
            teacher=labels / self.teacher_temperature if self.teacher_scores else None,
        )
        loss = self._mean(rows)
        metrics = parts | self._metrics(scores, own, excluded, scored)
        if self.sparse_floor:
            floor = self._floor(used)
            loss = loss + floor
            metrics["sparse_floor"] = floor.detach()
        queries = embeddings[count:]
        if queries:
            penalty = self._penalty(used[2:], queries)
            loss = (1 - self.penalty_weight) * loss + self.penalty_weight * penalty
            metrics["penalty"] = penalty.detach()
        if torch.is_grad_enabled():
            self.steps += 1
        self.last_metrics = metrics | temperature_metric(scale)
        return loss

    def _distils(self) -> bool:
        first = self.self_distillation_from
        return first is not None and int(self.steps) >= first

    def _of_lone_pair(self, used: list[HeadEmbeddings], scale: float | Tensor) -> Tensor:
        """Return 0 with a gradient of 0, so that a last, lone row does not end a training."""
        warn_of_lone_pair()
        self.last_metrics = temperature_metric(scale)
        sums = [tensor.float().sum() for texts in used for tensor in texts.tensors]
        return 0.0 * (torch.stack(sums).sum() + scale)

    def _mean(self, rows: Tensor) -> Tensor:
        """The mean over the rows of all processes, if they share a batch."""
        if not self.gathers:
            return rows.mean()
        return global_sum(rows.sum()) / global_sum(rows.new_tensor(float(len(rows))))

    def _candidates(self, columns: Columns, rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places of the rows' own passages [B, G], and what is no negative [B, N]."""
        device = like.device
        passages = len(columns) - 1
        counts, rank = [rows], 0
        if self.gathers:
            counts = [row[0] for row in table_of([rows], device)]
            rank = dist.get_rank()
        before = passages * sum(counts[:rank])
        own = torch.arange(passages, device=device) * rows + before
        own = torch.arange(rows, device=device)[:, None] + own
        ids = text_ids(columns) if self.mask_duplicates else None
        if self.gathers:  # all processes must take the same turn
            ids = (
                None if any(not row[0] for row in table_of([int(ids is not None)], device)) else ids
            )
        if ids is None:
            return own, torch.zeros_like(like, dtype=torch.bool)
        excluded = _duplicates(ids, counts, rank if self.gathers else None)
        kept = own if self.teacher_scores else own[:, :1]
        return own, excluded.scatter(1, kept, False)

    def _floor(self, used: list[HeadEmbeddings]) -> Tensor:
        """The penalty for tokens that lost their sparse weight, the mean over texts."""
        if torch.isnan(self.first_share):
            logits = torch.cat([texts.logits.detach() for texts in used])
            if not torch.is_grad_enabled():
                return logits.new_zeros(())
            counts = torch.tensor([int((logits > 0).sum()), len(logits)], device=logits.device)
            positive, tokens = global_sum(counts.float()) if self.gathers else counts.float()
            self.first_share.copy_(positive / tokens.clamp(min=1))
        share = self.sparse_floor * self.first_share
        penalties = [
            sparse_floor(
                texts.logits.to(compute_dtype(texts.logits.dtype)),
                texts.token_starts,
                share,
                self.sparse_margin,
            )
            for texts in used
        ]
        return self._mean(torch.stack(penalties).mean(0))

    def _penalty(self, negatives: list[HeadEmbeddings], queries: list[HeadEmbeddings]) -> Tensor:
        repeated = [n.dense for n in negatives for _ in range(self.queries_per_negative)]
        negative, query = torch.cat(repeated), torch.cat([q.dense for q in queries])
        penalty = contrastive_learning_penalty(negative, query)
        if not self.gathers:
            return penalty
        pairs = penalty.new_tensor(float(len(negative)))
        return global_sum(penalty * pairs) / global_sum(pairs)

    @torch.no_grad()
    def _metrics(
        self,
        scores: Sequence[Tensor],
        own: Tensor,
        excluded: Tensor,
        scored: Sequence[ScoredTexts],
    ) -> dict[str, Tensor]:
        combined = combined_scores(scores, self.score_weights).masked_fill(excluded, -torch.inf)
        positive = combined.gather(1, own[:, :1])
        first = (combined >= positive).sum(1) == 1  # ties count against the row
        entries = sum(len(texts.entries.weights) for texts in scored)
        texts = sum(texts.entries.num_texts for texts in scored)
        return {
            "in_batch_accuracy": first.to(combined.dtype).mean(),
            "sparse_nonzeros": combined.new_tensor(entries / texts),
        }


def _duplicates(ids: Sequence[Tensor], counts: list[int], rank: int | None) -> Tensor:
    """Where a candidate shares a text with a row, so that it is no negative of it, [B, N] bool.

    A pair of rows shares a text if their anchors or positives are equal, or one's anchor is the
    other's positive; a row and a hard negative, if this is the row's anchor or positive.

    Args:
        ids: of anchors, positives and hard negatives, each [B] int64, equal for equal texts.
        counts: the number of rows of each process.
        rank: of this process; ``None``: the batch is this process's alone.
    """
    mine = torch.stack(list(ids))  # [1 + G, B]
    anchor, positive = mine[0][:, None], mine[1][:, None]
    found = []
    for source, count in enumerate(counts):
        others = mine if rank in (None, source) else mine.new_empty((len(mine), count))
        if rank is not None:
            dist.broadcast(others, src=source)
        anchors, positives = others[0][None], others[1][None]
        for number, texts in enumerate(others[1:]):
            same = (texts == anchor) | (texts == positive)
            if number == 0:
                same = same | (anchors == anchor) | (anchors == positive) | (positives == positive)
            found.append(same)
    return torch.cat(found, dim=1)
