"""info_nce at several lengths of the same embeddings, with shared tiles.

With lengths d_1 < ... < d_L, the product at length d_l is the product at d_(l-1) plus that of the
dimensions in between (segment l). So a tile at all lengths costs one product of the longest:

    c_l = c_(l-1) + q[:, d_(l-1) : d_l] . k[:, d_(l-1) : d_l]^T,    s_l = scale * r_l c_l r'_l

Here r_l and r'_l are 1 / length of the truncated rows and columns (1 for dot products). In the
backward pass, with G_l = dL/ds_l as in :mod:`moe_fast.ops.info_nce.tiled` and cos_l = s_l / scale,
the dimensions of segment l get

    dq = scale * (sum_(m >= l) r_m G_m r'_m) . k - scale * (sum_(m >= l) r_m^2 <G_m, cos_m>) q

and the columns likewise: again one product of the longest length for each side. The second term is
the gradient of the norms; its sums are computed in the tile.

Source: Kusupati et al. (Matryoshka), arXiv 2205.13147.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fast.ops.checks import check_count, compute_dtype, without_autocast
from moe_fast.ops.cpu_matmul import add_product
from moe_fast.ops.eager_dispatch import Operation
from moe_fast.ops.info_nce.arguments import (
    as_scale,
    check_arguments,
    check_not_alone,
    check_scale,
    row_weights,
)
from moe_fast.ops.info_nce.tiled import (
    Terms,
    add_tile,
    both_directions,
    fake_backward,
    gradient_terms,
    new_sums,
    sides,
    tile_gradient,
)
from moe_fast.ops.info_nce.tiles import (
    Side,
    Workspace,
    blocks,
    check_finite,
    comparable,
    inverse_norm,
    tile_masks,
)


def matryoshka_info_nce(
    a: Tensor,
    b: Tensor,
    negatives: Tensor | None = None,
    *,
    dims: Sequence[int],
    scale: float | Tensor,
    similarity: str = "cosine",
    symmetric: bool = True,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    domain_ids: Tensor | None = None,
    group_ids: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`moe_fast.ops.info_nce` of the embeddings cut to each length.

    Args:
        dims: L lengths, increasing, the last at most d.
        a, b, negatives, ...: as in :func:`moe_fast.ops.info_nce`.

    Returns:
        The losses [L], float32 (float64 for float64 inputs), and the in-batch accuracy at the
        longest length, [] without a gradient. Gradients reach ``a``, ``b``, ``negatives`` and
        ``scale``.

    Raises:
        ValueError, TypeError: as in :func:`moe_fast.ops.info_nce`, or ``dims`` do not fit.
    """
    ids = {"row_ids": row_ids, "domain_ids": domain_ids, "group_ids": group_ids}
    check_arguments(a, b, negatives, similarity, label_smoothing, weights, col_ids, **ids)
    check_not_alone(a, negatives)
    dims = list(dims)
    for dim in dims:
        check_count("dims", dim)
    if not dims or sorted(set(dims)) != dims or dims[-1] > a.shape[1]:
        raise ValueError(
            f"dims must be increasing lengths of at most d = {a.shape[1]}, one or more; got {dims}."
        )
    losses, accuracy, *_ = _run(
        *(a, b, negatives, as_scale(scale, a.device, compute_dtype(a.dtype))),
        *(row_ids, col_ids, domain_ids, group_ids, weights),
        *(dims, label_smoothing, symmetric, similarity == "cosine"),
    )
    return losses, accuracy


@dataclass(frozen=True)
class _Lengths:
    """The settings that every tile is computed with.

    Attributes:
        dims: the lengths.
        factor: [], scale / ln 2, because logits are in base 2.
    """

    dims: list[int]
    factor: Tensor

    def segments(self) -> list[slice]:
        """Return the dimensions that each length adds to the one before."""
        return [slice(*ends) for ends in zip([0, *self.dims[:-1]], self.dims, strict=True)]

    def inverse_norms(self, x: Tensor, cosine: bool) -> Tensor:
        """Return 1 / length of the truncated rows of x [n, d], [L, n]; ones for dot products."""
        if cosine:
            return torch.stack([inverse_norm(x[:, :dim]) for dim in self.dims])
        return self.factor.new_ones((len(self.dims), len(x)))

    def logits(
        self, q: Tensor, k: Tensor, q_norms: Tensor, k_norms: Tensor, space: Workspace
    ) -> Iterator[Tensor]:
        """Yield s_l / ln 2 of a tile, [m, n], for each length; all use the same memory."""
        products = space.tile("products", len(q), len(k))
        for level, segment in enumerate(self.segments()):
            if level == 0:
                products.zero_()
            add_product(products, q[:, segment], k[:, segment].t())
            s = torch.mul(products, k_norms[level], out=space.tile("logits", len(q), len(k)))
            yield s.mul_((self.factor * q_norms[level])[:, None])


def _add_logits(
    rows: Side,
    columns: Side,
    lengths: _Lengths,
    norms: tuple[Tensor, Tensor],
    label_smoothing: float,
    row_sums: Tensor,
    column_sums: Tensor | None,
    own_logit: Tensor,
    best_negative: Tensor,
    own: bool,
) -> None:
    """Add all rows against some columns to the sums [L, 6, m] and [L, 6, n].

    At the longest length, ``own_logit`` [m] is written if ``own``, and ``best_negative`` [m] is
    raised to the largest logit of a negative.
    """
    rows, columns = comparable(rows, columns)
    space = Workspace(len(rows), len(columns), lengths.factor)
    for first, last in blocks(len(rows), rows.x.device):
        block, q_norms = rows.block(first, last), norms[0][:, first:last]
        q = block.x.to(q_norms.dtype)
        for low, high in blocks(len(columns), rows.x.device):
            tile, diagonal = columns.block(low, high), own and low == first
            masks = tile_masks(block, tile, diagonal, space)
            k = tile.x.to(q.dtype)
            tiles = lengths.logits(q, k, q_norms, norms[1][:, low:high], space)
            for level, s in enumerate(tiles):
                longest = level == len(lengths.dims) - 1
                if diagonal and longest:
                    own_logit[first:last] = s.diagonal()
                directions = [(row_sums[level, :, first:last], 1)]
                if column_sums is not None:
                    directions.append((column_sums[level, :, low:high], 0))
                add_tile(s, *masks, diagonal, label_smoothing, directions, space)
                if longest:  # s now holds the negatives only
                    best = best_negative[first:last]
                    torch.maximum(best, s.amax(1), out=best)


@dataclass(frozen=True)
class _Gradients:
    """The gradients of one side, which tiles are added to.

    Attributes:
        x: [n, d] ``sum_(m >= l) r_m G_m r'_m`` times the other side, by segment l.
        along: [L, n] ``<G_l, s_l / ln 2>``.
    """

    x: Tensor
    along: Tensor

    def finish(self, x: Tensor, norms: Tensor, lengths: _Lengths, cosine: bool) -> Tensor:
        """Return dL/dx [n, d]."""
        if cosine:
            # the coefficient of each segment: a sum over the lengths that contain it
            projection = (norms.square() * self.along / lengths.factor).flip(0).cumsum(0).flip(0)
            for segment, coefficient in zip(lengths.segments(), projection, strict=True):
                self.x[:, segment].addcmul_(
                    x[:, segment].to(self.x.dtype), coefficient[:, None], value=-1
                )
        return self.x.mul_(lengths.factor * math.log(2))


def _add_gradients(
    rows: Side,
    columns: Side,
    lengths: _Lengths,
    norms: tuple[Tensor, Tensor],
    upstream: Tensor,
    label_smoothing: float,
    row_terms: list[Terms],
    column_terms: list[Terms] | None,
    grad_rows: _Gradients,
    grad_columns: _Gradients,
    own: bool,
) -> None:
    """Add the gradients of all rows against some columns; ``upstream`` [L] is dL/dloss_l."""
    rows, columns = comparable(rows, columns)
    space = Workspace(len(rows), len(columns), lengths.factor)
    for first, last in blocks(len(rows), rows.x.device):
        block, q_norms = rows.block(first, last), norms[0][:, first:last]
        q = block.x.to(q_norms.dtype)
        for low, high in blocks(len(columns), rows.x.device):
            tile, diagonal = columns.block(low, high), own and low == first
            masks = tile_masks(block, tile, diagonal, space)
            k, k_norms = tile.x.to(q.dtype), norms[1][:, low:high]
            for level, s in enumerate(lengths.logits(q, k, q_norms, k_norms, space)):
                kept = space.tile("kept", *s.shape).copy_(s)
                by_row = row_terms[level].block(first, last)
                by_column = column_terms[level].block(low, high) if column_terms else None
                grad = tile_gradient(
                    s, *masks, diagonal, label_smoothing, by_row, by_column, space
                ).mul_(upstream[level])
                kept.mul_(grad)
                grad_rows.along[level, first:last] += kept.sum(1)
                grad_columns.along[level, low:high] += kept.sum(0)
                by_level = space.tile(f"gradient {level}", *s.shape)
                torch.mul(grad, k_norms[level], out=by_level).mul_(q_norms[level][:, None])
            total = by_level
            for level, segment in reversed(list(enumerate(lengths.segments()))):
                if level < len(lengths.dims) - 1:
                    total.add_(space.tile(f"gradient {level}", *total.shape))
                add_product(grad_rows.x[first:last, segment], total, k[:, segment])
                add_product(grad_columns.x[low:high, segment], total.t(), q[:, segment])


# --- the op --------------------------------------------------------------------------------------


@without_autocast
def _matryoshka(
    a: Tensor,
    b: Tensor,
    negatives: Tensor | None,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    domain_ids: Tensor | None,
    group_ids: Tensor | None,
    weights: Tensor | None,
    dims: list[int],
    label_smoothing: float,
    symmetric: bool,
    cosine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_scale(scale)
    check_finite(a=a, b=b, negatives=negatives)
    each = row_weights(weights, a)
    lengths = _Lengths(dims, scale / math.log(2))
    ids = (row_ids, col_ids, domain_ids, group_ids)
    rows, pairs, hard = sides(a, b, negatives, ids, cosine=False)
    row_sums = torch.stack([new_sums(len(a), scale) for _ in dims])
    column_sums = torch.stack([new_sums(len(b) if symmetric else 0, scale) for _ in dims])
    q_norms = lengths.inverse_norms(a, cosine)
    norms = (q_norms, lengths.inverse_norms(b, cosine))
    best_negative = torch.full_like(each, -torch.inf)
    seen = (torch.empty_like(each), best_negative)
    both = (row_sums, column_sums if symmetric else None)
    _add_logits(rows, pairs, lengths, norms, label_smoothing, *both, *seen, own=True)
    if hard is not None:
        norms = (q_norms, lengths.inverse_norms(hard.x, cosine))
        _add_logits(rows, hard, lengths, norms, label_smoothing, row_sums, None, *seen, own=False)
    of_columns = column_sums if symmetric else [None] * len(dims)
    losses = [
        (each * both_directions(*sums, label_smoothing)).sum()
        for sums in zip(row_sums, of_columns, strict=True)
    ]
    accuracy = (seen[0] > best_negative).to(scale.dtype).mean()
    return torch.stack(losses), accuracy, row_sums, column_sums


def _fake(a, b, negatives, scale, *rest):
    (dims, _, symmetric, _), batch = rest[-4:], a.shape[0]
    return (
        scale.new_empty((len(dims),)),
        scale.new_empty(()),
        scale.new_empty((len(dims), 6, batch)),
        scale.new_empty((len(dims), 6, batch if symmetric else 0)),
    )


@without_autocast
def _matryoshka_backward(grad_losses, a, b, negatives, scale, *rest):
    *ids, weights, row_sums, column_sums, dims, label_smoothing, symmetric, cosine = rest
    each = row_weights(weights, a)
    lengths = _Lengths(dims, scale / math.log(2))
    rows, pairs, hard = sides(a, b, negatives, ids, cosine=False)
    by_row = [gradient_terms(sums, each, label_smoothing) for sums in row_sums]
    by_column = None
    if symmetric:
        by_column = [gradient_terms(sums, each, label_smoothing) for sums in column_sums]
    upstream = grad_losses / 2 if symmetric else grad_losses

    def zeros(x: Tensor) -> _Gradients:
        along = scale.new_zeros((len(dims), len(x)))
        return _Gradients(torch.zeros_like(x, dtype=scale.dtype), along)

    q_norms, b_norms = lengths.inverse_norms(a, cosine), lengths.inverse_norms(b, cosine)
    grad_a, grad_b, grad_hard = zeros(a), zeros(b), zeros(a[:0] if negatives is None else negatives)
    shared = (upstream, label_smoothing, by_row)
    _add_gradients(
        *(rows, pairs, lengths, (q_norms, b_norms), *shared, by_column), grad_a, grad_b, own=True
    )
    if hard is not None:
        norms = lengths.inverse_norms(hard.x, cosine)
        _add_gradients(
            *(rows, hard, lengths, (q_norms, norms), *shared, None), grad_a, grad_hard, own=False
        )
        grad_hard.finish(hard.x, norms, lengths, cosine)
    # dL/dscale = sum_l <G_l, cos_l>, and cos_l = s_l / scale
    grad_scale = grad_a.along.sum() / lengths.factor
    return (
        grad_a.finish(a, q_norms, lengths, cosine).to(a.dtype),
        grad_b.finish(b, b_norms, lengths, cosine).to(b.dtype),
        grad_hard.x.to(a.dtype),
        grad_scale,
    )


_OPERATION = Operation(_matryoshka, _fake, fake_backward, differentiable=4, saved=(2, 3))
_run = _OPERATION.implement("matryoshka_info_nce", _matryoshka, _matryoshka_backward)
