"""info_nce without a B x B matrix: computes the loss's sums, then its gradient, tile by tile.

s_ij are the logits of rows (anchors) against columns (candidates), lse is a logsumexp, and w the
weights of rows. The forward pass needs one product. For each row and each column it sums over all
tiles (online, Milakov and Gimelshein, arXiv 1805.02867):

    neg  = logsumexp of the logits of its negatives       pos = logsumexp of those of its positives
    loss = (lse - pos) + (pos - mean positive logit),  lse - pos = softplus(neg - pos)

It never computes ``lse - s_ii``: the loss of a well separated pair is about 1e-8, but the rounding
error of its lse is 1e-6.

The backward pass needs three products: it computes the tile again, then its gradient

    G_ij = w_i (exp(s_ij - lse_i) - T_ij) + w_j (exp(s_ij - lse_j) - T'_ij)

with the targets T and T' of both directions, and multiplies it into both sides
(:mod:`moe_fast.ops.info_nce.tiles`). So a tile serves both directions. The gradient of a row's only
positive is ``-w_i sigmoid(neg - pos)``, for the reason above. Columns of hard negatives have no
second term.

Every function here takes some rows and some columns, so that several processes can share a batch
and add up the sums of the columns (:mod:`moe_fast.losses.functional.global_info_nce`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.checks import without_autocast
from moe_fast.ops.eager_dispatch import Operation
from moe_fast.ops.info_nce.arguments import check_scale, row_weights
from moe_fast.ops.info_nce.tiles import (
    MASKED,
    Side,
    Workspace,
    add_products,
    blocks,
    check_finite,
    comparable,
    finish_columns,
    inverse_norm,
    logits_tile,
    row_epilogue,
    scaled_rows,
    tile_masks,
)

# The six sums over the logits of a row (or column), [6, n]. Logits are in base 2.
NEG, POS = 0, 1  # log2 sum exp2 over negatives, and over positives
POS_SUM, POS_COUNT, ALL_SUM, ALL_COUNT = 2, 3, 4, 5  # sums; the last two only for smoothing


def new_sums(count: int, like: Tensor) -> Tensor:
    """Return the sums over no logits, [6, count]; ``like`` gives dtype and device.

    The six are the constants ``NEG`` to ``ALL_COUNT`` above.
    """
    sums = like.new_zeros((6, count))
    sums[:POS_SUM] = -torch.inf
    return sums


def join_sums(sums: Tensor, others: Tensor) -> None:
    """Add the sums over other logits, [6, n], to ``sums`` [6, n] in place."""
    torch.logaddexp2(sums[:POS_SUM], others[:POS_SUM], out=sums[:POS_SUM])
    sums[POS_SUM:] += others[POS_SUM:]


def cross_entropy(sums: Tensor, label_smoothing: float) -> Tensor:
    """Return the loss of each row (or column), [n], from its sums [6, n]."""
    neg, pos = sums[NEG], sums[POS]
    mean_positive = sums[POS_SUM] / sums[POS_COUNT]
    if not label_smoothing:
        bits = torch.logaddexp2(neg - pos, torch.zeros_like(pos)) + (pos - mean_positive)
        return bits * math.log(2)
    mean = sums[ALL_SUM] / sums[ALL_COUNT]
    target = (1 - label_smoothing) * mean_positive + label_smoothing * mean
    return (torch.logaddexp2(neg, pos) - target) * math.log(2)


def both_directions(row_sums: Tensor, column_sums: Tensor | None, label_smoothing: float) -> Tensor:
    """Return the loss of each row, [n]; given the columns' sums, the mean of both directions."""
    row_loss = cross_entropy(row_sums, label_smoothing)
    if column_sums is None:
        return row_loss
    return (row_loss + cross_entropy(column_sums, label_smoothing)) / 2


# --- forward -------------------------------------------------------------------------------------


def add_logits(
    rows: Side,
    columns: Side,
    scale: Tensor,
    label_smoothing: float,
    row_sums: Tensor,
    column_sums: Tensor | None,
    own_logit: Tensor,
    rank: Tensor,
    own: bool,
) -> None:
    """Add the logits of all m rows against n columns to the sums, in place.

    Args:
        rows, columns: the two sides.
        scale: [] in the dtype of the logits.
        label_smoothing: in [0, 1).
        row_sums: [6, m], added to.
        column_sums: [6, n], added to; ``None`` for columns without a loss.
        own_logit: [m], each row's logit with its own positive; written if ``own``, else read.
        rank: [m] int64, added to.
        own: whether the columns are the rows' own positives; this call must come first.
    """
    device = rows.x.device
    rows, columns = comparable(rows, columns)
    space = Workspace(len(rows), len(columns), scale)
    for first, last in blocks(len(rows), device):
        block = rows.block(first, last)
        scaled_q = scaled_rows(block, scale)
        here = own_logit[first:last]
        # The rows' own positives come first, because ranks compare with their logits.
        column_blocks = blocks(len(columns), device)
        for low, high in sorted(column_blocks, key=lambda block: own and block[0] != first):
            tile, diagonal = columns.block(low, high), own and low == first
            s = logits_tile(scaled_q, tile, space)
            if diagonal:
                here.copy_(s.diagonal())
            directions = [(row_sums[:, first:last], 1)]
            if column_sums is not None:
                directions.append((column_sums[:, low:high], 0))
            masks = tile_masks(block, tile, diagonal, space)
            add_tile(s, *masks, diagonal, label_smoothing, directions, space)
            smaller = torch.lt(s, here[:, None], out=space.tile("scratch", *s.shape))
            # "not smaller" instead of "larger or equal": a NaN counts, like a tie
            rank[first:last] += s.shape[1] - smaller.sum(1).to(torch.int64)


def add_tile(
    s: Tensor,
    positive: Tensor | None,
    excluded: Tensor | None,
    diagonal: bool,
    label_smoothing: float,
    directions: Sequence[tuple[Tensor, int]],
    space: Workspace,
) -> None:
    """Add a tile s [m, n] to the sums; masks all but the negatives in s.

    ``directions`` are pairs (sums [6, m] or [6, n], axis to sum over).
    """
    if label_smoothing:
        kept = torch.ones_like(s) if excluded is None else (excluded == 0).to(s.dtype)
        for sums, axis in directions:
            sums[ALL_SUM] += (s * kept).sum(axis)
            sums[ALL_COUNT] += kept.sum(axis)
    if excluded is not None:
        s.add_(excluded, alpha=MASKED)
    if positive is not None:
        positives = torch.add(s, 1 - positive, alpha=MASKED)
        for sums, axis in directions:
            sums[POS] = torch.logaddexp2(sums[POS], log2_sum_exp2(positives, axis, space))
            sums[POS_SUM] += (s * positive).sum(axis)
            sums[POS_COUNT] += positive.sum(axis)
        s.add_(positive, alpha=MASKED)
    elif diagonal:
        for sums, _ in directions:
            sums[POS] = sums[POS_SUM] = s.diagonal()
            sums[POS_COUNT] = 1
        s.fill_diagonal_(MASKED)
    for sums, axis in directions:
        sums[NEG] = torch.logaddexp2(sums[NEG], log2_sum_exp2(s, axis, space))


def log2_sum_exp2(s: Tensor, axis: int, space: Workspace) -> Tensor:
    """Return log2 sum exp2 of a tile over ``axis``: [n] for axis 0, [m] for axis 1."""
    largest = s.amax(axis, keepdim=True)
    shifted = torch.sub(s, largest, out=space.tile("scratch", *s.shape))
    return shifted.exp2_().sum(axis).log2_() + largest.squeeze(axis)


# --- backward ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Terms:
    """What the gradient of a tile needs from each row (or column): tensors [n].

    w is the row's weight, eps the label smoothing, lse the logsumexp of its logits.

    Attributes:
        log_total: lse - log w in base 2, so that ``exp2(s - log_total)`` is the weighted softmax.
        positive: w (1 - eps) / number of positives.
        every: w eps / number of candidates.
        own: the gradient of an only positive, exact even if it is tiny.
        alone: whether there is only one positive, and no smoothing.
    """

    log_total: Tensor
    positive: Tensor
    every: Tensor
    own: Tensor
    alone: Tensor

    def block(self, first: int, last: int) -> Terms:
        """Return the terms of rows ``first`` to ``last - 1``."""
        if first == 0 and last == len(self.own):
            return self
        fields = (getattr(self, name) for name in self.__dataclass_fields__)
        return Terms(*(t[first:last] for t in fields))


def gradient_terms(sums: Tensor, weights: Tensor, label_smoothing: float) -> Terms:
    """Compute the terms of rows (or columns) from their sums [6, n] and weights [n]."""
    neg, pos = sums[NEG], sums[POS]
    return Terms(
        log_total=torch.logaddexp2(neg, pos) - weights.log2(),
        positive=weights * (1 - label_smoothing) / sums[POS_COUNT],
        every=weights * label_smoothing / sums[ALL_COUNT].clamp(min=1),
        own=-weights * torch.sigmoid((neg - pos) * math.log(2)),
        alone=(sums[POS_COUNT] == 1) & (label_smoothing == 0),
    )


def add_gradients(
    rows: Side,
    columns: Side,
    scale: Tensor,
    label_smoothing: float,
    row_terms: Terms,
    column_terms: Terms | None,
    grad_rows: Tensor,
    grad_columns: Tensor,
    own: bool,
) -> None:
    """Add the gradients of all rows against some columns to [m, d] and [n, d].

    The results must be finished by :func:`moe_fast.ops.info_nce.tiles.row_epilogue` and
    ``finish_columns``. ``column_terms`` is ``None`` for columns without a loss; ``own`` as in
    :func:`add_logits`.
    """
    device = rows.x.device
    rows, columns = comparable(rows, columns)
    space = Workspace(len(rows), len(columns), scale)
    for first, last in blocks(len(rows), device):
        block, by_row = rows.block(first, last), row_terms.block(first, last)
        scaled_q = scaled_rows(block, scale)
        for low, high in blocks(len(columns), device):
            tile, diagonal = columns.block(low, high), own and low == first
            by_column = None if column_terms is None else column_terms.block(low, high)
            s = logits_tile(scaled_q, tile, space)
            masks = tile_masks(block, tile, diagonal, space)
            grad = tile_gradient(s, *masks, diagonal, label_smoothing, by_row, by_column, space)
            add_products(grad, scaled_q, tile, grad_rows[first:last], grad_columns[low:high])


def tile_gradient(
    s: Tensor,
    positive: Tensor | None,
    excluded: Tensor | None,
    diagonal: bool,
    label_smoothing: float,
    rows: Terms,
    columns: Terms | None,
    space: Workspace,
) -> Tensor:
    """Return the gradient G [m, n] of a tile s, which is overwritten."""

    def outer(of_row: Tensor, of_column: Tensor | None) -> Tensor:
        return of_row[:, None] if of_column is None else of_row[:, None] + of_column

    if excluded is not None:
        s.add_(excluded, alpha=MASKED)
    grad = torch.sub(s, rows.log_total[:, None], out=space.tile("scratch", *s.shape)).exp2_()
    if columns is not None:
        grad += s.sub_(columns.log_total).exp2_()
    if label_smoothing:
        target = outer(rows.every, None if columns is None else columns.every)
        grad -= target if excluded is None else target * (excluded == 0)
    if positive is not None:
        grad.addcmul_(
            positive, outer(rows.positive, None if columns is None else columns.positive), value=-1
        )
    if diagonal:
        on = grad.diagonal()
        own, target = rows.own, rows.positive
        if columns is not None:
            own, target = own + columns.own, target + columns.positive
        on.copy_(torch.where(rows.alone, own, on if positive is not None else on - target))
    return grad


# --- the op of one process -----------------------------------------------------------------------


def pair_side(x: Tensor, ids: Sequence[Tensor | None], cosine: bool) -> Side:
    """Make the side of anchors or positives x [B, d].

    ``ids`` are those of rows, columns, domains and groups, or ``None``.
    """
    row_ids, col_ids, domain_ids, group_ids = ids
    texts = None if col_ids is None else col_ids[: len(x)]
    return Side(x, inverse_norm(x) if cosine else None, row_ids, texts, domain_ids, group_ids)


def hard_side(
    negatives: Tensor | None, batch: int, ids: Sequence[Tensor | None], cosine: bool
) -> Side | None:
    """Make the side of hard negatives [B * G, d] with their rows' domains, or ``None``."""
    if negatives is None or not len(negatives):
        return None
    _, col_ids, domain_ids, _ = ids
    if domain_ids is not None:
        domain_ids = domain_ids.repeat_interleave(len(negatives) // batch)
    texts = None if col_ids is None else col_ids[batch:]
    return Side(negatives, inverse_norm(negatives) if cosine else None, None, texts, domain_ids)


def sides(
    a: Tensor, b: Tensor, negatives: Tensor | None, ids: Sequence[Tensor | None], cosine: bool
) -> tuple[Side, Side, Side | None]:
    """Return the sides of anchors, positives and hard negatives (``None`` without any)."""
    rows, pairs = (pair_side(x, ids, cosine) for x in (a, b))
    return rows, pairs, hard_side(negatives, len(a), ids, cosine)


@without_autocast
def _info_nce_tiled(
    a: Tensor,
    b: Tensor,
    negatives: Tensor | None,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    domain_ids: Tensor | None,
    group_ids: Tensor | None,
    weights: Tensor | None,
    label_smoothing: float,
    symmetric: bool,
    cosine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_scale(scale)
    check_finite(a=a, b=b, negatives=negatives)
    each = row_weights(weights, a)
    ids = (row_ids, col_ids, domain_ids, group_ids)
    rows, pairs, hard = sides(a, b, negatives, ids, cosine)
    row_sums = new_sums(len(rows), scale)
    column_sums = new_sums(len(pairs) if symmetric else 0, scale)
    own_logit = torch.empty_like(row_sums[0])
    rank = torch.ones(len(rows), dtype=torch.int64, device=a.device)
    both = (row_sums, column_sums if symmetric else None)
    add_logits(rows, pairs, scale, label_smoothing, *both, own_logit, rank, own=True)
    if hard is not None:
        add_logits(rows, hard, scale, label_smoothing, row_sums, None, own_logit, rank, own=False)
    row_loss = both_directions(row_sums, both[1], label_smoothing)
    return (each * row_loss).sum(), row_loss, rank, row_sums, column_sums


def _fake(a, b, negatives, scale, *rest):
    batch, symmetric = a.shape[0], rest[-2]
    return (
        scale.new_empty(()),
        scale.new_empty((batch,)),
        a.new_empty((batch,), dtype=torch.int64),
        scale.new_empty((6, batch)),
        scale.new_empty((6, batch if symmetric else 0)),
    )


@without_autocast
def _info_nce_tiled_backward(grad_loss, a, b, negatives, scale, *rest):
    *ids, weights, row_sums, column_sums, label_smoothing, symmetric, cosine = rest
    each = row_weights(weights, a)
    rows, pairs, hard = sides(a, b, negatives, ids, cosine)
    by_row = gradient_terms(row_sums, each, label_smoothing)
    by_column = gradient_terms(column_sums, each, label_smoothing) if symmetric else None
    grad_a, grad_b = (torch.zeros_like(x, dtype=scale.dtype) for x in (a, b))
    grad_hard = scale.new_zeros((0 if hard is None else len(hard), a.shape[1]))
    add_gradients(rows, pairs, scale, label_smoothing, by_row, by_column, grad_a, grad_b, own=True)
    factor = grad_loss / 2 if symmetric else grad_loss
    if hard is not None:
        add_gradients(
            rows, hard, scale, label_smoothing, by_row, None, grad_a, grad_hard, own=False
        )
        finish_columns(hard, grad_hard, factor)
    finish_columns(pairs, grad_b, factor)
    grad_scale = row_epilogue(rows, grad_a, scale, factor)
    return grad_a.to(a.dtype), grad_b.to(b.dtype), grad_hard.to(a.dtype), grad_scale


def fake_backward(grad_loss, a, b, negatives, scale, *rest):
    """Return empty gradients of the right shapes, for this op and matryoshka's."""
    return (
        a.new_empty(a.shape),
        b.new_empty(b.shape),
        a.new_empty((0, a.shape[1]) if negatives is None else negatives.shape),
        scale.new_empty(()),
    )


OPERATION = Operation(_info_nce_tiled, _fake, fake_backward, differentiable=4, saved=(3, 4))
_run_op = OPERATION.implement("info_nce_tiled", _info_nce_tiled, _info_nce_tiled_backward)


def run(*inputs):
    """Compute the loss, row losses and ranks."""
    return _run_op(*inputs)[:3]


backends.register("info_nce", "tiled", run)
