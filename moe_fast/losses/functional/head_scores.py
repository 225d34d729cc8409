"""head_scores: dense, sparse and multi-vector scores of a batch's queries against all candidates.

Columns are the candidates: for each process, for each of its text columns (the positives, then the
hard negatives), its texts. With several processes, one after the other sends a column of texts to
all; each process scores its own queries against it and keeps only the scores. The backward pass
sends the columns again, and adds up the gradients in the process that owns the texts. So a process
holds its own texts and one column of another process, whatever their number.

The gradient of a process's texts is the sum over all processes' queries; averaged over processes,
as data-parallel training does, a loss that is a mean over all rows must therefore multiply its
gradient by the number of processes (:func:`moe_fast.losses.global_sum.global_sum` does).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_fast.losses.cross_device_negatives import table_of
from moe_fast.losses.functional.lexical import (
    LexicalEntries,
    lexical_entries,
    lexical_scores,
    score_gradients,
)
from moe_fast.losses.head_embeddings import HeadEmbeddings
from moe_fast.ops.maxsim import maxsim, maxsim_gradients


@dataclass(frozen=True)
class ScoredTexts:
    """N texts as they are scored.

    Attributes:
        dense: [N, d].
        entries: the positive weights, one per text and vocabulary id.
        vectors: [M, D'].
        vector_starts: [N + 1] int64.
    """

    dense: Tensor
    entries: LexicalEntries
    vectors: Tensor
    vector_starts: Tensor

    @classmethod
    def of(cls, texts: HeadEmbeddings) -> ScoredTexts:
        """Take the maximum of each text's token weights per vocabulary id."""
        entries = lexical_entries(texts.logits, texts.ids, texts.token_starts)
        return cls(texts.dense, entries, texts.vectors, texts.vector_starts)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three tensors that have gradients."""
        return self.dense, self.entries.weights, self.vectors

    def with_tensors(self, dense: Tensor, weights: Tensor, vectors: Tensor) -> ScoredTexts:
        """The same texts with other values of :attr:`tensors`."""
        return replace(
            self, dense=dense, entries=replace(self.entries, weights=weights), vectors=vectors
        )

    def sizes(self) -> list[int]:
        """The numbers of texts, entries and vectors, from which :meth:`empty` makes memory."""
        return [len(self.dense), len(self.entries.weights), len(self.vectors)]

    def empty(self, num_texts: int, num_entries: int, num_vectors: int) -> ScoredTexts:
        """Memory for other texts of these sizes."""
        entries = LexicalEntries(
            texts=self.entries.texts.new_empty(num_entries),
            ids=self.entries.ids.new_empty(num_entries),
            weights=self.entries.weights.new_empty(num_entries),
            num_texts=num_texts,
        )
        return ScoredTexts(
            self.dense.new_empty(num_texts, self.dense.shape[1]),
            entries,
            self.vectors.new_empty(num_vectors, self.vectors.shape[1]),
            self.vector_starts.new_empty(num_texts + 1),
        )

    def parts(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        return [*self.tensors, self.entries.texts, self.entries.ids, self.vector_starts]


def head_scores(
    queries: ScoredTexts, columns: Sequence[ScoredTexts], gather: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the scores [B, N] of the three heads; gradients reach queries and columns.

    Args:
        queries: B texts.
        columns: this process's candidates, at least one column of texts.
        gather: score against the candidates of all processes, in the order of their ranks. Every
            process must call, with equally many columns, and again in the backward pass.

    Returns:
        The dense, the sparse and the multi-vector scores.
    """
    sizes = [[column.sizes() for column in columns]]
    if gather:
        flat = [size for column in columns for size in column.sizes()]
        rows = table_of([len(flat), *flat], queries.dense.device)
        sizes = [[row[i : i + 3] for i in range(1, len(row), 3)] for row in rows]
    tensors = [t for texts in (queries, *columns) for t in texts.tensors]
    return _Scores.apply(queries, columns, sizes, gather, *tensors)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: ScoredTexts,
        columns: Sequence[ScoredTexts],
        sizes: list[list[list[int]]],
        gather: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(*tensors)
        # The texts without their tensors, which save_for_backward holds, and frees.
        ctx.texts = [_without_tensors(texts) for texts in (queries, *columns)]
        ctx.exchange = sizes, gather
        scored = [_scores(queries, texts) for texts, _ in _visit(columns, sizes, gather)]
        dense, sparse, multi = (torch.cat(parts, dim=1) for parts in zip(*scored, strict=True))
        return dense, sparse, multi

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        texts = [part.with_tensors(*tensors[3 * i : 3 * i + 3]) for i, part in enumerate(ctx.texts)]
        queries, columns = texts[0], texts[1:]
        found: list[Any] = [None] * len(texts)
        first = 0
        for part, own in _visit(columns, *ctx.exchange):
            last = first + len(part.dense)
            here = [grad[:, first:last].contiguous() for grad in grads]
            of_queries, of_part = _gradients(here, queries, part)
            found[0] = _sum(found[0], of_queries)
            kept = _reduce(of_part, own[0]) if ctx.exchange[1] else of_part
            if kept is not None:
                found[1 + own[1]] = kept
            del of_queries, of_part, kept
            first = last
        return None, None, None, None, *(grad for three in found for grad in three)


def _without_tensors(texts: ScoredTexts) -> ScoredTexts:
    nothing = texts.dense.new_empty(0)
    return texts.with_tensors(nothing, nothing, nothing)


def _scores(queries: ScoredTexts, texts: ScoredTexts) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(queries.dense.device.type, enabled=False):
        dense = queries.dense @ texts.dense.t()
    sparse = lexical_scores(queries.entries, texts.entries)
    starts = queries.vector_starts, texts.vector_starts
    return dense, sparse, maxsim(queries.vectors, texts.vectors, *starts)


def _gradients(
    grads: Sequence[Tensor], queries: ScoredTexts, texts: ScoredTexts
) -> tuple[list[Tensor], list[Tensor]]:
    dense, sparse, multi = grads
    of_weights = score_gradients(sparse, queries.entries, texts.entries)
    starts = queries.vector_starts, texts.vector_starts
    of_vectors = maxsim_gradients(multi, queries.vectors, texts.vectors, *starts)
    with torch.autocast(dense.device.type, enabled=False):
        of_dense = dense @ texts.dense, dense.t() @ queries.dense
    left, right = zip(of_dense, of_weights, of_vectors, strict=True)
    return list(left), list(right)


def _sum(total: list[Tensor] | None, more: list[Tensor]) -> list[Tensor]:
    if total is None:
        return more
    for tensor, other in zip(total, more, strict=True):
        tensor += other
    return total


def _visit(
    columns: Sequence[ScoredTexts], sizes: list[list[list[int]]], gather: bool
) -> Iterator[tuple[ScoredTexts, tuple[int, int]]]:
    """Yield every process's columns in turn, with (rank, column)."""
    mine = dist.get_rank() if gather else 0
    for rank, of_process in enumerate(sizes):
        for number, size in enumerate(of_process):
            own = columns[number]
            if not gather:
                yield own, (rank, number)
                continue
            texts = own if rank == mine else own.empty(*size)
            for part in texts.parts():
                if part.numel():
                    dist.broadcast(part.contiguous() if rank == mine else part, src=rank)
            yield texts, (rank, number)


def _reduce(grads: list[Tensor], owner: int) -> list[Tensor] | None:
    """Sum the gradients in the process that owns the texts; ``None`` in the others."""
    for grad in grads:
        if grad.numel():
            dist.reduce(grad, dst=owner)
    return grads if owner == dist.get_rank() else None
