"""info_nce over the rows of all processes: every candidate of every process is a negative.

Each process compares its own B rows (anchors) with the columns (positives and hard negatives) of
all N processes:

    The sums of a column over all rows are joined from the sums over each process's rows.
    The gradient dL/dk of a column is the sum of the processes' shares; its owner adds them up.

So the N processes share the 4 matrix products of the whole batch evenly. The columns reach the rows
in one of the two ways of :mod:`moe_fast.losses.cross_device_negatives`.

Every process returns the loss of the whole batch. The gradient is that of the whole batch times N,
because data-parallel training averages the gradients of N processes; the average is then what one
process with the whole batch would compute (see :func:`moe_fast.losses.global_sum.global_sum`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_fast.losses.cross_device_negatives import AllGather, Ring, Shard, table_of
from moe_fast.losses.global_sum import several_processes
from moe_fast.ops import InfoNCEStats, info_nce
from moe_fast.ops.checks import FLOAT_DTYPES, check_choice, compute_dtype
from moe_fast.ops.info_nce.arguments import (
    as_scale,
    check_arguments,
    check_scale,
    check_weights,
)
from moe_fast.ops.info_nce.tiled import (
    add_gradients,
    add_logits,
    both_directions,
    gradient_terms,
    new_sums,
    pair_side,
)
from moe_fast.ops.info_nce.tiles import check_finite, finish_columns, row_epilogue

EXCHANGES = {"gather": AllGather, "ring": Ring}


def global_info_nce(
    a: Tensor,
    b: Tensor,
    negatives: Tensor | None = None,
    *,
    scale: float | Tensor,
    similarity: str = "cosine",
    symmetric: bool = True,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    domain_ids: Tensor | None = None,
    group_ids: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    return_stats: bool = False,
    exchange: str = "gather",
) -> Tensor | tuple[Tensor, InfoNCEStats]:
    """Compute :func:`moe_fast.ops.info_nce` of the rows of all processes as one batch.

    Every process must call this; they may have different numbers of rows. With one process, or
    without a process group, it calls that function directly.

    Args:
        a, b, negatives, ...: this process's rows, as in :func:`moe_fast.ops.info_nce`. Ids are
            compared between processes, and weights are relative to those of all processes.
            ``scale`` must be the same in every process.
        exchange: "gather" (every process holds all columns) or "ring" (those of two processes at a
            time); the result is the same.

    Returns:
        The loss of the whole batch, the same in every process, or ``(loss, stats)`` with the
        statistics of this process's rows among all candidates.

    Raises:
        ValueError, TypeError: the arguments of some process do not fit, or those of the processes
            do not fit together. Every process raises.
    """
    check_choice("exchange", exchange, EXCHANGES)
    given: dict[str, Any] = dict(
        similarity=similarity,
        row_ids=row_ids,
        col_ids=col_ids,
        domain_ids=domain_ids,
        group_ids=group_ids,
        weights=weights,
        label_smoothing=label_smoothing,
    )
    if not several_processes():
        return info_nce(
            a, b, negatives, scale=scale, symmetric=symmetric, return_stats=return_stats, **given
        )
    sizes = _agree(a, b, negatives, scale, given)
    scale = as_scale(scale, a.device, compute_dtype(a.dtype))
    ids = (row_ids, col_ids, domain_ids, group_ids)
    setup = (EXCHANGES[exchange], sizes, label_smoothing, symmetric, similarity == "cosine")
    loss, row_loss, rank = _GlobalInfoNCE.apply(a, b, negatives, scale, *ids, weights, setup)
    if not return_stats:
        return loss
    return loss, InfoNCEStats(row_loss, rank, (rank == 1).to(row_loss.dtype).mean())


def _agree(
    a: Tensor, b: Tensor, negatives: Tensor | None, scale: float | Tensor, given: dict[str, Any]
) -> list[tuple[int, int]]:
    """Return (pairs, hard negatives) of each process after all have checked their arguments.

    Raises in every process if the arguments of one do not fit, or differ between processes.
    """
    refused: Exception | None = None
    mine = [1] + [0] * len(_ALIKE) + [0, 0, 0]
    try:
        check_arguments(a, b, negatives, **given)
        check_scale(as_scale(scale, a.device, compute_dtype(a.dtype)))
        check_finite(a=a, b=b, negatives=negatives)
        weighed = check_weights(given["weights"])
        has = [int(given[name] is not None) for name in ("row_ids", "domain_ids", "group_ids")]
        num_negatives = 0 if negatives is None else len(negatives)
        alike = [a.shape[1], FLOAT_DTYPES.index(a.dtype), num_negatives // len(a), *has]
        mine = [0, *alike, weighed, len(a), num_negatives]
    except (TypeError, ValueError) as error:
        refused = error
    table = table_of(mine, a.device)
    if refused is not None:
        raise refused
    for rank, row in enumerate(table):
        if row[0]:
            raise ValueError(f"process {rank} cannot use its batch; its own error says why.")
    for name, column in zip(_ALIKE, range(1, 1 + len(_ALIKE)), strict=True):
        values: list[Any] = [row[column] for row in table]
        if name == "dtype":
            values = [str(FLOAT_DTYPES[v]).removeprefix("torch.") for v in values]
        if len(set(values)) > 1:
            raise ValueError(f"all processes must have the same {name}; got {values}, by rank.")
    if not any(row[-3] for row in table):
        raise ValueError("weights must not all be 0; they are in every process.")
    return [(row[-2], row[-1]) for row in table]


_ALIKE = (
    "embedding dimension d",
    "dtype",
    "number of hard negatives per row",
    "choice to give row_ids and col_ids (1) or not (0)",
    "choice to give domain_ids (1) or not (0)",
    "choice to give group_ids (1) or not (0)",
)


def _global_weights(weights: Tensor | None, a: Tensor) -> Tensor:
    """Return the weights of this process's rows, [B], that sum to 1 over all processes."""
    dtype = compute_dtype(a.dtype)
    mine = a.new_ones(len(a), dtype=dtype) if weights is None else weights.to(dtype)
    total = mine.sum()
    dist.all_reduce(total)
    return mine / total


class _GlobalInfoNCE(torch.autograd.Function):
    """Computes the sums of rows and columns, then the gradients; an exchange brings the columns."""

    @staticmethod
    @torch.no_grad()
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        negatives: Tensor | None,
        scale: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        *ids, weights, setup = rest
        make_exchange, sizes, smoothing, symmetric, cosine = setup
        each = _global_weights(weights, a)
        hard = b[:0] if negatives is None else negatives
        exchange = make_exchange(Shard(b, hard, each, *ids), sizes)
        rows = pair_side(a, ids, cosine)
        row_sums = new_sums(len(a), scale)
        own_logit = torch.empty_like(each)
        rank = torch.ones(len(a), dtype=torch.int64, device=a.device)

        def add(shard: Shard, column_sums: Tensor, own: bool) -> None:
            pairs, hard = shard.sides(cosine)
            both = (row_sums, column_sums if symmetric else None)
            add_logits(rows, pairs, scale, smoothing, *both, own_logit, rank, own)
            if hard is not None:
                add_logits(rows, hard, scale, smoothing, row_sums, None, own_logit, rank, False)

        column_sums = exchange.add_sums(add, scale)
        row_loss = both_directions(row_sums, column_sums if symmetric else None, smoothing)
        loss = (each * row_loss).sum()
        dist.all_reduce(loss)
        ctx.save_for_backward(a, scale, row_sums, column_sums, *ids)
        ctx.rest = (exchange, smoothing, symmetric, cosine, each, negatives is not None)
        ctx.mark_non_differentiable(row_loss, rank)
        return loss, row_loss, rank

    @staticmethod
    @torch.no_grad()
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple:  # type: ignore[override]
        a, scale, row_sums, column_sums, *ids = ctx.saved_tensors
        exchange, smoothing, symmetric, cosine, each, has_negatives = ctx.rest
        rows = pair_side(a, ids, cosine)
        by_row = gradient_terms(row_sums, each, smoothing)
        grad_a = torch.zeros_like(a, dtype=scale.dtype)

        def add(shard: Shard, sums: Tensor, grad_b: Tensor, grad_hard: Tensor, own: bool) -> None:
            pairs, hard = shard.sides(cosine)
            by_column = gradient_terms(sums, shard.weights, smoothing) if symmetric else None
            add_gradients(rows, pairs, scale, smoothing, by_row, by_column, grad_a, grad_b, own)
            if hard is not None:
                add_gradients(rows, hard, scale, smoothing, by_row, None, grad_a, grad_hard, False)

        grad_b, grad_hard = exchange.add_gradients(add, column_sums, scale.dtype)
        factor = grad_loss * dist.get_world_size() / (2 if symmetric else 1)
        pairs, hard = exchange.mine.sides(cosine)
        finish_columns(pairs, grad_b, factor)
        if hard is not None:
            finish_columns(hard, grad_hard, factor)
        grad_scale = row_epilogue(rows, grad_a, scale, factor)
        grad_negatives = grad_hard.to(a.dtype) if has_negatives else None
        grads = (grad_a.to(a.dtype), grad_b.to(a.dtype), grad_negatives, grad_scale)
        return *grads, *[None] * 6
