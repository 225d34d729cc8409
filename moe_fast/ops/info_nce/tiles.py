"""Logits of a contrastive loss tile by tile: what the losses share that never hold B x B.

A tile is a block of rows (anchors) against a block of columns (candidates):

    s_ij = scale * <q_i, k_j>,  q and k being the embeddings, at unit length for cosines

A gradient G = dL/ds of such a tile gives ``dq += scale * G . k`` and ``dk += scale * G^T . q``.
Nothing of the size of B x d is copied: columns are normalised by scaling the tile, and the
projections that the gradient of a normalisation asks for are done once, row by row, at the end.

Tiles are as large as a cache likes them on a CPU, and large enough to fill a GPU. Their memory is
taken once. They hold logits in base 2, ``s / ln 2``: exp2 is the faster exponential everywhere, and
on a CPU the only one without a slow range (exp of what is masked takes 30 times as long).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_fast.ops.checks import checks_values, compute_dtype
from moe_fast.ops.cpu_matmul import add_product, multiply

TILE_ROWS = {"cpu": 1024, "cuda": 4096}
_FEW_ROWS = 128  # sorting ids pays above that, see comparable()
_SHORTEST = 1e-12  # as torch.nn.functional.normalize: a shorter vector has no direction

# What is left out of a softmax gets this logit: finite, so that nothing turns into NaN, and so low
# that its exponential is 0 beside any other.
MASKED = -1e30


@dataclass(frozen=True)
class Side:
    """n embeddings on one side of the logits, and the ids that say which pairs are left out.

    Attributes:
        x: [n, d].
        inverse_norm: [n], 1 / length, 0 for a zero vector; ``None`` for dot products.
        anchor_ids: [n] text of each pair's anchor; ``None`` for hard negatives, or without masks.
        text_ids: [n] text of each pair's positive, or of the hard negative.
        domain_ids: [n]; a hard negative has the domain of its row.
        group_ids: [n]; ``None`` for hard negatives.
    """

    x: Tensor
    inverse_norm: Tensor | None
    anchor_ids: Tensor | None = None
    text_ids: Tensor | None = None
    domain_ids: Tensor | None = None
    group_ids: Tensor | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    def block(self, first: int, last: int) -> Side:
        """Rows ``first`` to ``last`` alone."""
        if first == 0 and last == len(self):
            return self

        def cut(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[first:last]

        ids = (self.anchor_ids, self.text_ids, self.domain_ids, self.group_ids)
        return Side(self.x[first:last], cut(self.inverse_norm), *map(cut, ids))


def inverse_norm(x: Tensor) -> Tensor:
    """[n] 1 / length of each row of x [n, d], in at least float32; 0 for a zero vector."""
    dtype = compute_dtype(x.dtype)
    norm = torch.linalg.vector_norm(x, dim=1, dtype=dtype)
    # In this order, or the gradient of a zero vector would be NaN.
    return 1 / torch.where(norm > _SHORTEST, norm, torch.inf)


def check_finite(**embeddings: Tensor | None) -> None:
    """Raise ``ValueError`` naming a row that holds NaN or infinity, where values are read.

    Values whose products overflow, of which a cosine would be 0 and a dot product NaN, count too.
    """
    if torch.compiler.is_compiling():
        return
    for name, x in embeddings.items():
        if x is None or x.numel() == 0 or not checks_values(x.device):
            continue
        dtype = compute_dtype(x.dtype)
        most = math.sqrt(torch.finfo(dtype).max / x.shape[1])
        low, high = (bound.item() for bound in torch.aminmax(x))  # one pass, no memory
        if -most <= low and high <= most:  # false for NaN
            continue
        infinite = ~x.isfinite()
        if infinite.any():
            row = int(infinite.any(1).nonzero()[0])
            raise ValueError(f"{name} must be finite; row {row} holds NaN or infinity.")
        row = int((x.abs() > most).any(1).nonzero()[0])
        raise ValueError(
            f"{name} must hold values up to {most:.1e}, whose products fit in {dtype}; row {row} "
            f"holds {x[row].abs().max().item():.1e}."
        )


def tile_size(device: torch.device) -> int:
    """The most rows, and columns, of a tile."""
    return TILE_ROWS.get(device.type, TILE_ROWS["cuda"])


def blocks(count: int, device: torch.device) -> list[tuple[int, int]]:
    """(first, last) of the blocks that ``count`` rows are worked through in."""
    size = tile_size(device)
    return [(first, min(first + size, count)) for first in range(0, count, size)]


class Workspace:
    """Memory for a few tiles at a time, taken once: fresh memory costs more than most passes.

    Args:
        rows, columns: of all logits.
        like: a tensor of the logits' dtype and device.
    """

    def __init__(self, rows: int, columns: int, like: Tensor) -> None:
        size = tile_size(like.device)
        self._area = min(rows, size) * min(columns, size)
        self._like = like
        self._memory: dict[str, Tensor] = {}

    def tile(self, name: str, rows: int, columns: int) -> Tensor:
        """[rows, columns], holding anything; one per name at a time."""
        if name not in self._memory:
            self._memory[name] = self._like.new_empty(self._area)
        return self._memory[name][: rows * columns].view(rows, columns)


def scaled_rows(rows: Side, scale: Tensor) -> Tensor:
    """[m, d] ``scale / ln 2 * q`` in the scale's dtype: one side of the product."""
    q, scale = rows.x.to(scale.dtype), scale / math.log(2)
    return q * (scale if rows.inverse_norm is None else (scale * rows.inverse_norm)[:, None])


def logits_tile(scaled_q: Tensor, columns: Side, space: Workspace) -> Tensor:
    """s / ln 2, [m, n], to be overwritten."""
    out = space.tile("logits", len(scaled_q), len(columns))
    s = multiply(scaled_q, columns.x.to(scaled_q.dtype).t(), out=out)
    return s if columns.inverse_norm is None else s.mul_(columns.inverse_norm)


def add_products(
    grad: Tensor, scaled_q: Tensor, columns: Side, grad_rows: Tensor, grad_columns: Tensor
) -> None:
    """Adds ``G . k`` to ``grad_rows`` [m, d] and ``G^T . scaled_q`` to ``grad_columns`` [n, d].

    ``grad`` [m, n] is overwritten. For what is left to do see :func:`row_epilogue` and
    :func:`finish_columns`: ``k`` is not at unit length, and its length is missing in its own sum.
    """
    if columns.inverse_norm is not None:
        grad.mul_(columns.inverse_norm)
    add_product(grad_rows, grad, columns.x.to(grad.dtype))
    add_product(grad_columns, grad.t(), scaled_q)


def row_epilogue(rows: Side, grad: Tensor, scale: Tensor, factor: Tensor) -> Tensor:
    """Turns ``sum G . k`` [M, d] into dL/dx in place, times ``factor``; returns dL/dscale, [].

    ``dq = scale * sum G . k``, and ``dL/dscale = sum_ij G_ij <q_i, k_j> = sum_i <q_i, sum G . k>``.
    """
    total = project_to_tangent(rows, grad)
    if rows.inverse_norm is not None:
        grad.mul_(rows.inverse_norm[:, None])
    grad.mul_(scale * factor)
    return total * factor


def finish_columns(columns: Side, grad: Tensor, factor: Tensor) -> None:
    """Turns ``inverse_norm * sum G^T . scaled_q`` [N, d] into dL/dx in place, times ``factor``.

    The scaled rows are in base 2, the gradient is not.
    """
    project_to_tangent(columns, grad)
    grad.mul_(factor * math.log(2))


def project_to_tangent(side: Side, grad: Tensor) -> Tensor:
    """Projects ``grad`` [n, d] onto the tangent space of the unit sphere, in place.

    The gradient of a dot product, which sees lengths, stays as it is.

    Returns:
        [] the sum of ``<u, grad>``, u being x at unit length; for dot products x itself.
    """
    total = grad.new_zeros(())
    for first, last in blocks(len(side), grad.device):
        rows, part = side.block(first, last), grad[first:last]
        u = rows.x.to(grad.dtype)
        if rows.inverse_norm is not None:
            u = u * rows.inverse_norm[:, None]
        along = torch.linalg.vecdot(u, part)
        if rows.inverse_norm is not None:
            part.addcmul_(u, along[:, None], value=-1)
        total += along.sum()
    return total


def comparable(rows: Side, columns: Side) -> tuple[Side, Side]:
    """:func:`with_small_ids`, but of few rows the ids stay as they are.

    Finding smaller ones would take longer than what these save.
    """
    if max(len(rows), len(columns)) <= min(_FEW_ROWS, tile_size(rows.x.device)):
        return rows, columns
    return with_small_ids(rows, columns)


def with_small_ids(rows: Side, columns: Side) -> tuple[Side, Side]:
    """Both sides with small numbers for ids, equal where the ids are: floats, fast to compare.

    Exact for 2^24 ids, more than the rows of any batch.
    """
    sides = [rows, columns]
    for names in (("anchor_ids", "text_ids"), ("domain_ids",), ("group_ids",)):
        given = [(n, i) for n in names for i in (0, 1) if getattr(sides[i], n) is not None]
        if not given:
            continue
        known = torch.cat([getattr(sides[i], n) for n, i in given]).sort().values
        for n, i in given:
            small = torch.searchsorted(known, getattr(sides[i], n).contiguous())
            sides[i] = replace(sides[i], **{n: small.to(torch.float32)})
    return sides[0], sides[1]


def tile_masks(
    rows: Side, columns: Side, own: bool, space: Workspace
) -> tuple[Tensor | None, Tensor | None]:
    """Which pairs of a tile are positives, and which are left out of it.

    Args:
        rows, columns: made :func:`comparable`.
        own: whether the diagonal is of the rows' own positives.

    Returns:
        ``positive`` [m, n], 1 or 0, and ``None`` where there are no groups: then the diagonal alone
        is. ``excluded`` [m, n], greater than 0 where a pair takes no part, ``None`` where all do.
        Both are floats, in the workspace: several times faster than masks of bools.
    """
    shape = (len(rows), len(columns))
    positive = None
    if rows.group_ids is not None and columns.group_ids is not None:
        positive = space.tile("positive", *shape)
        torch.eq(rows.group_ids[:, None], columns.group_ids, out=positive)
    excluded = None
    for comparison, row_ids, column_ids in _clashes(rows, columns):
        clash = space.tile("scratch" if excluded is not None else "excluded", *shape)
        comparison(row_ids[:, None], column_ids, out=clash)
        excluded = clash if excluded is None else excluded.add_(clash)
    if excluded is not None and positive is not None:
        excluded.addcmul_(excluded, positive, value=-1)
    elif excluded is not None and own:
        excluded.fill_diagonal_(0)
    return positive, excluded


def _clashes(rows: Side, columns: Side) -> Iterator[tuple]:
    """What to compare: the same text anywhere in two rows, or another domain."""
    if rows.domain_ids is not None:
        yield torch.ne, rows.domain_ids, columns.domain_ids
    for row_ids in (rows.anchor_ids, rows.text_ids):
        for column_ids in (columns.anchor_ids, columns.text_ids):
            if row_ids is not None and column_ids is not None:
                yield torch.eq, row_ids, column_ids
