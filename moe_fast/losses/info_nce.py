"""InfoNCE, also called the multiple negatives ranking loss, for any sentence encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_fast import ops
from moe_fast.losses.base import (
    Columns,
    TemperatureLoss,
    check_num_columns,
    temperature_metric,
    warn_of_lone_pair,
)
from moe_fast.losses.citations import citation_of
from moe_fast.losses.functional.global_info_nce import EXCHANGES, global_info_nce
from moe_fast.losses.global_sum import several_processes
from moe_fast.losses.negative_masks import NEGATIVES_FROM, batch_masks, check_masks, interleave
from moe_fast.ops.checks import check_choice, compute_dtype


class InfoNCELoss(TemperatureLoss):
    """Cross entropy of each anchor's similarities against its own positive.

    The candidates of a row are the positives of the batch and every hard negative; see
    :func:`moe_fast.ops.info_nce` for the mathematics. With its defaults, on a batch without
    duplicate texts, it equals sentence-transformers' ``MultipleNegativesRankingLoss`` (scale 20,
    one direction). ``symmetric`` is off by default so that a model trained with that loss can
    switch to this one without a change in numbers. ``symmetric=True`` equals that loss's
    ``directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"``.

    It works for mixture-of-experts and dense encoders alike. The matrix of B x B logits is never
    held in memory, so the batch may be as large as the memory for the embeddings allows.

    Columns: anchor, positive, any number of hard negatives. The positive of row i is row i or, if
    the anchor's features hold ``group_ids`` ([B] int64), every row of its group. Labels are
    ignored.

    Args:
        model: a ``SentenceTransformer``, or any module that maps a features dict to a dict with
            ``sentence_embedding`` [B, d].
        temperature: similarities are divided by it; if it is learned, its initial value.
        learn_temperature: makes ``log_temperature`` a parameter. The learning rate of an encoder
            is too small for it: give it its own (``learning_rate_mapping={"log_temperature":
            1e-3}`` in sentence-transformers' training arguments). Train with
            :class:`moe_fast.training.MoESentenceTransformerTrainer`, which saves and restores it.
        min_temperature, max_temperature: bounds of a learned temperature.
        similarity: "cosine" or "dot".
        symmetric: take the mean of both directions, anchors to candidates and positives to
            anchors; the second has no hard negatives. False: the first alone.
        mask_duplicates: never take a text as a negative of itself. Texts are compared by the hashes
            of :class:`moe_fast.training.DomainDataCollator`, or by their tokens without these.
        negatives_from: "all", or "same_domain" (needs the collator's ``domain_ids``).
        label_smoothing: in [0, 1).
        gather_across_devices: treat the rows of all training processes as one batch: a row's
            negatives come from every process, and the mean of the processes' gradients is the
            gradient of one process with the whole batch. Every process must call. Without
            gradients (in evaluation) each process uses its own rows only.
        exchange: how columns are exchanged: "gather" (every process holds all embeddings) or
            "ring" (those of two processes at a time, for batches that one device cannot hold).

    Attributes:
        last_metrics: after a call, the detached ``in_batch_accuracy`` and, if it is learned, the
            ``temperature``, both [] on the device; empty before the first call.

    Raises:
        ValueError: for a value out of range, naming the argument.
    """

    citation = citation_of("oord2018cpc")

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 0.05,
        learn_temperature: bool = False,
        min_temperature: float = 0.01,
        max_temperature: float = 1.0,
        similarity: str = "cosine",
        symmetric: bool = False,
        mask_duplicates: bool = True,
        negatives_from: str = "all",
        label_smoothing: float = 0.0,
        gather_across_devices: bool = False,
        exchange: str = "gather",
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
        check_choice("exchange", exchange, EXCHANGES)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1); got {label_smoothing!r}.")
        self.symmetric = symmetric
        self.mask_duplicates = mask_duplicates
        self.negatives_from = negatives_from
        self.label_smoothing = label_smoothing
        self.gather_across_devices = gather_across_devices
        self.exchange = exchange

    @property
    def gathers(self) -> bool:
        """Whether a call now exchanges columns with other processes."""
        return self.gather_across_devices and torch.is_grad_enabled() and several_processes()

    def check_columns(self, columns: Columns, labels: Any) -> None:
        """Raise ``ValueError`` if anchor, positive or domain ids that are needed are missing."""
        check_num_columns(self, columns, 2, "anchor, positive, then hard negatives")
        check_masks(columns, self.negatives_from)

    def from_embeddings(self, embeddings: list[Tensor], columns: Columns, labels: Any) -> Tensor:
        """See :class:`moe_fast.losses.base.EmbeddingLoss`."""
        if self._is_lone_pair(embeddings):
            return self._of_lone_pair(embeddings)
        info_nce = ops.info_nce
        if self.gathers:
            info_nce = partial(global_info_nce, exchange=self.exchange)
        scale = self.current_scale()
        arguments = self._arguments(embeddings, columns)
        loss, stats = info_nce(**arguments, scale=scale, return_stats=True)
        self._keep_metrics(stats.accuracy, scale)
        return loss

    def at_lengths(
        self, embeddings: list[Tensor], columns: Columns, dims: Sequence[int]
    ) -> Tensor | None:
        """Compute the losses [L] of the embeddings cut to each of the L increasing ``dims``.

        All lengths share one pass. Returns ``None`` if :meth:`from_embeddings` must be called for
        each length instead: in a subclass with a loss of its own, with columns exchanged between
        processes, and for a batch of one pair.
        """
        own = type(self).from_embeddings is not InfoNCELoss.from_embeddings
        if own or self.gathers or self._is_lone_pair(embeddings):
            return None
        scale = self.current_scale()
        arguments = self._arguments(embeddings, columns)
        losses, accuracy = ops.matryoshka_info_nce(**arguments, scale=scale, dims=dims)
        self._keep_metrics(accuracy, scale)
        return losses

    def _is_lone_pair(self, embeddings: list[Tensor]) -> bool:
        return len(embeddings) == 2 and len(embeddings[0]) == 1 and not self.gathers

    def _of_lone_pair(self, embeddings: list[Tensor]) -> Tensor:
        """Return 0 with a gradient of 0, so that a last, lone row does not end a training."""
        warn_of_lone_pair()
        scale = self.current_scale()
        self._keep_metrics(embeddings[0].new_ones(()), scale)
        dtype = compute_dtype(embeddings[0].dtype)
        total = torch.stack([rows.sum(dtype=dtype) for rows in embeddings]).sum()
        return 0.0 * (total + scale)

    def _arguments(self, embeddings: list[Tensor], columns: Columns) -> dict[str, Any]:
        masks = batch_masks(columns, self.mask_duplicates, self.negatives_from)
        return masks | {
            "a": embeddings[0],
            "b": embeddings[1],
            "negatives": interleave(embeddings[2:]) if len(embeddings) > 2 else None,
            "similarity": self.similarity,
            "symmetric": self.symmetric,
            "label_smoothing": self.label_smoothing,
        }

    def _keep_metrics(self, accuracy: Tensor, scale: float | Tensor) -> None:
        self.last_metrics = {"in_batch_accuracy": accuracy.detach()} | temperature_metric(scale)
